# Keyed digests of raw bytes at memory speed: multiply-and-fold over 64-bit words.
#
# Not cryptographic. Without the secret nobody can construct a collision, and a collision costs one
# more compare, never a wrong answer: keys are always compared byte for byte.

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
    N_SECRETS = 64     # 64-bit words of the secret: two per 16 bytes of a key of 512 bytes
    SAMPLED_MIN = 513  # bytes; keys from this length on are first digested by samples


cdef inline uint64_t pair(const uint8_t* p, uint64_t secret, uint64_t lane) noexcept nogil:
    """Fold 16 bytes with two words: two secrets, or a secret and the previous result."""
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


cdef inline uint64_t middle_digest(
    const uint8_t* p, size_t n, uint64_t seed, const uint64_t* secret
) noexcept nogil:
    """Digest 17 to 512 bytes: independent products, one per 16 bytes, each with its own secrets."""
    cdef const uint8_t* last = p + n - 16
    cdef const uint64_t* s = secret
    cdef uint64_t total = seed
    while p < last:
        total += pair(p, s[0], s[1])
        p += 16
        s += 2
    total += pair(last, secret[62], secret[63])
    return fold(total ^ secret[0], secret[1] ^ n)


cdef inline uint64_t chained_digest(
    const uint8_t* p, size_t n, uint64_t seed, const uint64_t* secret
) noexcept nogil:
    """Digest 129 bytes or more: 8 chains, so that order matters in keys of any length."""
    cdef const uint8_t* last = p + n - 128
    cdef uint64_t lane[8]
    cdef int i
    for i in range(8):
        lane[i] = seed ^ secret[i]
    while p < last:
        for i in range(8):
            lane[i] = pair(p + 16 * i, secret[8 + i], lane[i])
        p += 128
    for i in range(8):
        lane[i] = pair(last + 16 * i, secret[16 + i], lane[i])
    for i in range(4):
        lane[i] = fold(lane[i] ^ secret[24 + i], lane[4 + i] ^ secret[28 + i])
    lane[0] += lane[1] ^ fold(lane[2] ^ secret[32], lane[3] ^ secret[33])
    return fold(lane[0] ^ secret[34], secret[35] ^ n)


cdef inline uint64_t full_digest(
    const uint8_t* p, size_t n, uint64_t seed, const uint64_t* secret
) noexcept nogil:
    """Digest all `n` bytes."""
    if n <= 16:
        return short_digest(p, n, seed, secret)
    if n < SAMPLED_MIN:
        return middle_digest(p, n, seed, secret)
    return chained_digest(p, n, seed, secret)


cdef inline uint64_t sampled_digest(
    const uint8_t* p, size_t n, uint64_t seed, const uint64_t* secret
) noexcept nogil:
    """Digest the first 32 bytes, the last 64 and 6 windows of 16 between; n >= SAMPLED_MIN.

    The end gets more samples: chats begin alike and end with the same 33 characters, which open an
    answer.
    """
    cdef size_t stride = (n - 32 - 64) // 7
    cdef const uint8_t* tail = p + n - 64
    cdef const uint8_t* q = p + 32 + stride
    cdef uint64_t total = seed
    total += pair(p, secret[0], secret[1]) + pair(p + 16, secret[2], secret[3])
    total += pair(tail, secret[4], secret[5]) + pair(tail + 16, secret[6], secret[7])
    total += pair(tail + 32, secret[8], secret[9]) + pair(tail + 48, secret[10], secret[11])
    total += pair(q, secret[12], secret[13])
    total += pair(q + stride, secret[14], secret[15])
    total += pair(q + 2 * stride, secret[16], secret[17])
    total += pair(q + 3 * stride, secret[18], secret[19])
    total += pair(q + 4 * stride, secret[20], secret[21])
    total += pair(q + 5 * stride, secret[22], secret[23])
    return fold(total ^ secret[24], secret[25] ^ n)
