/* The end of a growing text stays in view, until the reader scrolls up from it. */

const ROUNDING_PX = 3; // scrollTop is a fraction on zoomed pages
const WORTH_A_BUTTON_PX = 120;

export class EndFollower {
  #isAtEnd = true;
  #lastTop = 0;

  /** The button, shown while the end is far away, leads back to it. */
  constructor(scroller, content, button) {
    Object.assign(this, { scroller, button });
    scroller.addEventListener("scroll", () => this.#onScroll());
    button.addEventListener("click", () => this.stick());
    const growth = new ResizeObserver(() => this.#isAtEnd && this.stick());
    growth.observe(scroller);
    growth.observe(content);
  }

  stick() {
    this.#isAtEnd = true;
    this.scroller.scrollTop = this.scroller.scrollHeight;
    this.button.hidden = true;
  }

  #onScroll() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    const distance = scrollHeight - scrollTop - clientHeight;
    if (distance < ROUNDING_PX) this.#isAtEnd = true;
    else if (scrollTop < this.#lastTop) this.#isAtEnd = false;
    this.#lastTop = scrollTop;
    this.button.hidden = this.#isAtEnd || distance < WORTH_A_BUTTON_PX;
  }
}
