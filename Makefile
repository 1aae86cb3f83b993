PYTHON ?= python3
BIN := .venv/bin

.PHONY: env demo test check

env: .venv/ready

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --upgrade pip
	$(BIN)/pip install -r requirements.txt
	touch .venv/ready

demo: env
	$(BIN)/python data_utils.py
	$(BIN)/python train.py
	$(BIN)/python infer_finetuning.py --query 从南京到上海的路线
	printf '南京有什么好吃的？\n第一种怎么做？\n' | $(BIN)/python infer_finetuning.py

# Two processes, a file of tests in one of them; in order, since the longest stands at the beginning.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# Without the slow ones, which `make check` runs too.
test: env
	$(PYTEST) -m "not slow"

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST)
