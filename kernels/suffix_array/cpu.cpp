// Suffix array by induced sorting (Nong, Zhang and Chan 2009). The suffix behind the last character counts as the
// smallest.
#include "../simd.h"

namespace {

// Suffix i is S-type if it is smaller than suffix i + 1, else L-type; an S-type after an L-type is a leftmost S (LMS).
class Types {
public:
    template <typename Char>
    Types(const Char* text, int64_t count) : bits_((uint64_t*)calloc(count / 64 + 1, 8)) {
        if (!bits_) return;
        bool smaller = false;
        for (int64_t i = count - 2; i >= 0; i--) {
            smaller = text[i] < text[i + 1] || (text[i] == text[i + 1] && smaller);
            bits_[i >> 6] |= (uint64_t)smaller << (i & 63);
        }
    }
    Types(const Types&) = delete;
    ~Types() { free(bits_); }
    bool made() const { return bits_ != nullptr; }
    bool s(int64_t i) const { return bits_[i >> 6] >> (i & 63) & 1; }
    bool lms(int64_t i) const { return i > 0 && s(i) && !s(i - 1); }

private:
    uint64_t* bits_;
};

// The range of the result that suffixes with one first character take, for every character.
class Buckets {
public:
    template <typename Char>
    Buckets(const Char* text, int64_t count, int64_t characters)
        : characters_(characters), counts_((int32_t*)calloc(characters, 4)), edges_((int32_t*)malloc(characters * 4)) {
        if (made())
            for (int64_t i = 0; i < count; i++) counts_[text[i]]++;
    }
    Buckets(const Buckets&) = delete;
    ~Buckets() {
        free(counts_);
        free(edges_);
    }
    bool made() const { return counts_ && edges_; }
    int32_t* begins() { return edges(0); }
    int32_t* ends() { return edges(1); }

private:
    int32_t* edges(int end) {
        int32_t sum = 0;
        for (int64_t c = 0; c < characters_; c++) {
            edges_[c] = end ? sum + counts_[c] : sum;
            sum += counts_[c];
        }
        return edges_;
    }
    int64_t characters_;
    int32_t *counts_, *edges_;
};

// From the LMS suffixes at the ends of their buckets, in order, and -1 elsewhere: all suffixes in order.
template <typename Char>
void induce(const Char* text, int32_t* order, int64_t count, const Types& types, Buckets& buckets) {
    int32_t* begin = buckets.begins();
    order[begin[text[count - 1]]++] = (int32_t)(count - 1);
    for (int64_t i = 0; i < count; i++) {
        const int32_t before = order[i] - 1;
        if (before >= 0 && !types.s(before)) order[begin[text[before]]++] = before;
    }
    int32_t* end = buckets.ends();
    for (int64_t i = count - 1; i >= 0; i--) {
        const int32_t before = order[i] - 1;
        if (before >= 0 && types.s(before)) order[--end[text[before]]] = before;
    }
}

// Whether the texts from one LMS position to the next are equal.
template <typename Char>
bool same_lms(const Char* text, int64_t count, const Types& types, int64_t a, int64_t b) {
    for (int64_t d = 0;; d++) {
        if (a + d == count || b + d == count || text[a + d] != text[b + d] || types.s(a + d) != types.s(b + d))
            return false;
        if (d > 0 && types.lms(a + d)) return types.lms(b + d);
    }
}

// text [count] with values below `characters` -> order [count]; false without memory
template <typename Char>
bool sort_suffixes(const Char* text, int32_t* order, int64_t count, int64_t characters) {
    if (count == 0) return true;
    const Types types(text, count);
    Buckets buckets(text, count, characters);
    if (!types.made() || !buckets.made()) return false;

    // The LMS positions, in any order, induce the order of the texts between LMS positions.
    for (int64_t i = 0; i < count; i++) order[i] = -1;
    int32_t* end = buckets.ends();
    for (int64_t i = count - 1; i > 0; i--)
        if (types.lms(i)) order[--end[text[i]]] = (int32_t)i;
    induce(text, order, count, types, buckets);

    // Their ranks are a shorter text; it lies in the second half of order, for LMS positions are at least two apart.
    int64_t found = 0;
    for (int64_t i = 0; i < count; i++)
        if (types.lms(order[i])) order[found++] = order[i];
    for (int64_t i = found; i < count; i++) order[i] = -1;
    int64_t names = 0;
    for (int64_t i = 0; i < found; i++) {
        if (i == 0 || !same_lms(text, count, types, order[i - 1], order[i])) names++;
        order[found + order[i] / 2] = (int32_t)(names - 1);
    }
    for (int64_t i = count - 1, to = count - 1; i >= found; i--)
        if (order[i] >= 0) order[to--] = order[i];
    int32_t* reduced = order + count - found;
    if (names < found) {
        if (!sort_suffixes(reduced, order, found, names)) return false;
    } else {
        for (int64_t i = 0; i < found; i++) order[reduced[i]] = (int32_t)i;
    }

    // Now the LMS suffixes are in order, and induce the order of all.
    for (int64_t i = 1, to = 0; i < count; i++)
        if (types.lms(i)) reduced[to++] = (int32_t)i;
    for (int64_t i = 0; i < found; i++) order[i] = reduced[order[i]];
    for (int64_t i = found; i < count; i++) order[i] = -1;
    end = buckets.ends();
    for (int64_t i = found - 1; i >= 0; i--) {
        const int32_t position = order[i];
        order[i] = -1;
        order[--end[text[position]]] = position;
    }
    induce(text, order, count, types, buckets);
    return true;
}

// text [count] -> order [count]
struct SuffixArrayArguments {
    int32_t* order;
    const uint8_t* text;
    int64_t count;
};

}  // namespace

HASTEN_EXPORT(suffix_array, SuffixArrayArguments)(const SuffixArrayArguments& in) {
    return sort_suffixes(in.text, in.order, in.count, 256) ? 0 : 2;
}
