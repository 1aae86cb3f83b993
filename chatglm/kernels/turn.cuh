// Rotary positions of 64 of a head's values, eight and their fellows at a time.

// first: eight values x of a half's first quarter, second: their fellows y in its second; the angles'
// cosines and sines stand from the first value's on.
DEVICE void turn(uint4& first, uint4& second, const float* cosines, const float* sines,
                 float direction = 1) {
    u32 *a = (u32*)&first, *b = (u32*)&second;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float x[2] = {low(a[j]), high(a[j])}, y[2] = {low(b[j]), high(b[j])};
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float c = cosines[j * 2 + h], s = direction * sines[j * 2 + h], old = x[h];
            x[h] = __fmaf_rn(old, c, -y[h] * s);
            y[h] = __fmaf_rn(y[h], c, old * s);
        }
        a[j] = pack(x[0], x[1]);
        b[j] = pack(y[0], y[1]);
    }
}
