# Keyed digests of raw bytes at memory speed: multiply-and-fold over 64-bit words.
#
# Not cryptographic. Whoever doesn't know the secret can't aim at a collision, and a collision
# costs a compare, never a wrong answer: keys are always compared byte for byte.

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    static inline uint64_t tokcache_read64(const uint8_t *p) {
        uint64_t value;
        memcpy(&value, p, 8);
        return value;
    }
    static inline uint64_t tokcache_read32(const uint8_t *p) {
        uint32_t value;
        memcpy(&value, p, 4);
        return value;
    }
    static inline uint64_t tokcache_fold(uint64_t a, uint64_t b) {
        unsigned __int128 product = (unsigned __int128)a * b;
        return (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    """
    uint64_t read64 "tokcache_read64"(const uint8_t* p) noexcept nogil
    uint64_t read32 "tokcache_read32"(const uint8_t* p) noexcept nogil
    uint64_t fold "tokcache_fold"(uint64_t a, uint64_t b) noexcept nogil


cdef enum:
    N_SECRETS = 8      # 64-bit words of the secret
    SAMPLED_MIN = 513  # bytes; a longer key is digested by samples first
    EDGE = 64          # bytes sampled at each end
    WINDOW = 32        # bytes of each of the 8 windows between


cdef inline uint64_t pair(const uint8_t* p, uint64_t secret, uint64_t lane) noexcept nogil:
    """Fold 16 bytes into a lane."""
    return fold(read64(p) ^ secret, read64(p + 8) ^ lane)


cdef inline uint64_t short_digest(
    const uint8_t* p, size_t n, uint64_t seed, const uint64_t* secret
) noexcept nogil:
    """Digest at most 16 bytes."""
    cdef uint64_t x = 0, y = 0
    if n >= 8:
        x = read64(p)
        y = read64(p + n - 8)
    elif n >= 4:
        x = read32(p)
        y = read32(p + n - 4)
    elif n > 0:
        x = (<uint64_t> p[0] << 16) | (<uint64_t> p[n >> 1] << 8) | p[n - 1]
    return fold(fold(x ^ secret[1], y ^ seed), secret[2] ^ n)


cdef inline uint64_t full_digest(
    const uint8_t* p, size_t n, uint64_t seed, const uint64_t* secret
) noexcept nogil:
    """Digest all `n` bytes: 8 independent lanes while 128 bytes are left."""
    cdef uint64_t a = seed ^ secret[0]
    cdef uint64_t b, c, d, e, f, g, h
    cdef const uint8_t* end = p + n
    if n <= 16:
        return short_digest(p, n, a, secret)
    b = a ^ secret[1]
    if n > 128:
        c = a ^ secret[2]
        d = a ^ secret[3]
        e = a ^ secret[4]
        f = a ^ secret[5]
        g = a ^ secret[6]
        h = a ^ secret[7]
        while end - p > 128:
            a = pair(p, secret[0], a)
            b = pair(p + 16, secret[1], b)
            c = pair(p + 32, secret[2], c)
            d = pair(p + 48, secret[3], d)
            e = pair(p + 64, secret[4], e)
            f = pair(p + 80, secret[5], f)
            g = pair(p + 96, secret[6], g)
            h = pair(p + 112, secret[7], h)
            p += 128
        a = fold(a ^ e, secret[1] ^ c) ^ fold(b ^ f, secret[2] ^ d)
        b = fold(g ^ secret[3], h ^ secret[4])
    while end - p > 32:
        a = pair(p, secret[1], a)
        b = pair(p + 16, secret[2], b)
        p += 32
    if end - p > 16:
        b = pair(p, secret[3], b)
    a = pair(end - 16, secret[4], a)
    return fold(a ^ secret[5], b ^ secret[6] ^ n)


cdef inline uint64_t sampled_digest(
    const uint8_t* p, size_t n, uint64_t seed, const uint64_t* secret
) noexcept nogil:
    """Digest both ends and 8 windows spread between; `n` is at least SAMPLED_MIN."""
    cdef size_t stride = (n - 2 * EDGE - WINDOW) // 7
    cdef const uint8_t* tail = p + n - EDGE
    cdef const uint8_t* q = p + EDGE
    cdef uint64_t a = pair(p, secret[0], seed ^ secret[4])
    cdef uint64_t b = pair(p + 16, secret[1], seed ^ secret[5])
    cdef uint64_t c = pair(p + 32, secret[2], seed ^ secret[6])
    cdef uint64_t d = pair(p + 48, secret[3], seed ^ secret[7])
    cdef uint64_t e = pair(tail, secret[4], seed ^ secret[0])
    cdef uint64_t f = pair(tail + 16, secret[5], seed ^ secret[1])
    cdef uint64_t g = pair(tail + 32, secret[6], seed ^ secret[2])
    cdef uint64_t h = pair(tail + 48, secret[7], seed ^ secret[3])
    a = pair(q, secret[0], a)
    b = pair(q + 16, secret[1], b)
    c = pair(q + stride, secret[2], c)
    d = pair(q + stride + 16, secret[3], d)
    e = pair(q + 2 * stride, secret[4], e)
    f = pair(q + 2 * stride + 16, secret[5], f)
    g = pair(q + 3 * stride, secret[6], g)
    h = pair(q + 3 * stride + 16, secret[7], h)
    q += 4 * stride
    a = pair(q, secret[0], a)
    b = pair(q + 16, secret[1], b)
    c = pair(q + stride, secret[2], c)
    d = pair(q + stride + 16, secret[3], d)
    e = pair(q + 2 * stride, secret[4], e)
    f = pair(q + 2 * stride + 16, secret[5], f)
    g = pair(q + 3 * stride, secret[6], g)
    h = pair(q + 3 * stride + 16, secret[7], h)
    a = fold(a ^ e, secret[1] ^ c) ^ fold(b ^ f, secret[2] ^ d)
    return fold(a ^ secret[3], fold(g ^ secret[4], h ^ secret[5]) ^ n)
