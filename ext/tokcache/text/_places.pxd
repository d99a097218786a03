# Finds the places where a text may be cut, 64 bytes at a time, if the CPU has AVX2.
#
# The class of a byte is looked up in a table of 16 rows of 16, the pair of two neighbours' classes
# in a matrix of bits. Both fit into registers.

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <stdint.h>

    typedef struct {
        uint8_t low[16];   /* by left class: a bit for each right class from 0 to 7 */
        uint8_t high[16];  /* by left class: a bit for each right class from 8 to 15 */
    } tokcache_pairs;

    #if defined(__x86_64__) && defined(__GNUC__)
    #include <immintrin.h>

    static inline int tokcache_has_vectors(void) {
        return __builtin_cpu_supports("avx2") != 0;
    }

    __attribute__((target("avx2")))
    static inline __m256i tokcache_table(const uint8_t *rows) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)rows));
    }

    __attribute__((target("avx2")))
    static inline __m256i tokcache_classes(__m256i bytes, const uint8_t *classes) {
        const __m256i low = _mm256_and_si256(bytes, _mm256_set1_epi8(15));
        const __m256i row = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15));
        const int n_rows = _mm256_movemask_epi8(bytes) ? 16 : 8;
        __m256i found = _mm256_setzero_si256();
        for (int i = 0; i < n_rows; i++) {
            const __m256i own = _mm256_cmpeq_epi8(row, _mm256_set1_epi8((char)i));
            const __m256i there = _mm256_shuffle_epi8(tokcache_table(classes + 16 * i), low);
            found = _mm256_or_si256(found, _mm256_and_si256(own, there));
        }
        return found;
    }

    __attribute__((target("avx2")))
    static uint64_t tokcache_places(
        const uint8_t *bytes, uint32_t left_class, uint32_t newline, const uint8_t *classes,
        const tokcache_pairs *pairs, uint64_t *behind_newline
    ) {
        static const uint8_t low_bits[16] = {1, 2, 4, 8, 16, 32, 64, 128};
        static const uint8_t high_bits[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 64, 128};
        const __m256i zero = _mm256_setzero_si256();
        __m256i before = _mm256_set1_epi8((char)left_class);
        uint64_t places = 0;
        *behind_newline = 0;
        for (int half = 0; half < 2; half++) {
            const __m256i own = tokcache_classes(
                _mm256_loadu_si256((const __m256i *)(bytes + 32 * half)), classes
            );
            const __m256i left = _mm256_alignr_epi8(
                own, _mm256_permute2x128_si256(before, own, 0x21), 15
            );
            const __m256i low = _mm256_and_si256(
                _mm256_shuffle_epi8(tokcache_table(pairs->low), left),
                _mm256_shuffle_epi8(tokcache_table(low_bits), own)
            );
            const __m256i high = _mm256_and_si256(
                _mm256_shuffle_epi8(tokcache_table(pairs->high), left),
                _mm256_shuffle_epi8(tokcache_table(high_bits), own)
            );
            const __m256i none = _mm256_cmpeq_epi8(_mm256_or_si256(low, high), zero);
            const __m256i behind = _mm256_cmpeq_epi8(left, _mm256_set1_epi8((char)newline));
            places |= (uint64_t)(uint32_t)~_mm256_movemask_epi8(none) << 32 * half;
            *behind_newline |= (uint64_t)(uint32_t)_mm256_movemask_epi8(behind) << 32 * half;
            before = own;
        }
        return places;
    }
    #else
    static inline int tokcache_has_vectors(void) { return 0; }
    static inline uint64_t tokcache_places(
        const uint8_t *bytes, uint32_t left_class, uint32_t newline, const uint8_t *classes,
        const tokcache_pairs *pairs, uint64_t *behind_newline
    ) { return 0; }
    #endif
    """
    ctypedef struct Pairs "tokcache_pairs":
        uint8_t[16] low
        uint8_t[16] high
    bint has_vectors "tokcache_has_vectors"() noexcept nogil
    # Returns a bit for each of 64 bytes: 1 if `pairs` contains the classes of the byte and of its
    # left neighbour. `behind_newline` gets a bit for each byte whose left neighbour is a newline.
    uint64_t places_of "tokcache_places"(
        const uint8_t* bytes, uint32_t left_class, uint32_t newline, const uint8_t* classes,
        const Pairs* pairs, uint64_t* behind_newline
    ) noexcept nogil


cdef inline void fill_pairs(Pairs* pairs, const uint8_t* allowed) noexcept nogil:
    """Fill `pairs` from a matrix of 16 by 16 classes with one byte per pair."""
    cdef int left, right
    cdef uint32_t bits
    for left in range(16):
        bits = 0
        for right in range(16):
            bits |= <uint32_t> (allowed[16 * left + right] != 0) << right
        pairs.low[left] = <uint8_t> bits
        pairs.high[left] = <uint8_t> (bits >> 8)
