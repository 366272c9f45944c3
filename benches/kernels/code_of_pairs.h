// The prefix code of layout `pair` (kernels/pair.cu) for counted pairs of exponents: which pairs get a symbol, and the
// lengths of their codes. Plain C++, made on the host.
#pragma once
#include <algorithm>
#include <cstdint>
#include <iterator>
#include <utility>
#include <vector>

namespace bench {

struct CodeOfPairs {
  std::vector<uint16_t> codes;  // 65536, as pair.cu wants them
  std::vector<uint32_t> table;  // 256
  int filler;                   // the pair with the shortest code, for padding
  int symbols;
  double bits;  // a weight: codes and repairs
};

// Lengths of the best prefix code that has none above `limit`: package-merge (Larmore and Hirschberg 1990).
inline std::vector<int> limited_lengths(const std::vector<double>& weights, int limit) {
  struct Item {
    double weight;
    std::vector<uint16_t> symbols;
  };
  const auto lighter = [](const Item& a, const Item& b) { return a.weight < b.weight; };
  std::vector<Item> leaves;
  for (size_t i = 0; i < weights.size(); i++) leaves.push_back({weights[i], {(uint16_t)i}});
  std::stable_sort(leaves.begin(), leaves.end(), lighter);
  std::vector<Item> items = leaves;
  for (int length = 1; length < limit; length++) {
    std::vector<Item> packages, next;
    for (size_t i = 0; i + 1 < items.size(); i += 2) {
      Item both{items[i].weight + items[i + 1].weight, items[i].symbols};
      both.symbols.insert(both.symbols.end(), items[i + 1].symbols.begin(), items[i + 1].symbols.end());
      packages.push_back(std::move(both));
    }
    std::merge(leaves.begin(), leaves.end(), packages.begin(), packages.end(), std::back_inserter(next), lighter);
    items.swap(next);
  }
  std::vector<int> lengths(weights.size(), 0);
  if (weights.size() == 1) return {1};
  for (size_t i = 0; i < 2 * weights.size() - 2; i++)
    for (const int symbol : items[i].symbols) lengths[symbol]++;
  return lengths;
}

constexpr double REPAIR_COST = 48;  // in bits, of which it has 32: products spend time on it besides

// A choice of symbols and what it costs. A pair is 256 e0 + e1.
struct Symbols {
  std::vector<int> pairs, lengths, index;  // index[pair], -1 for none
  double bits = 0, cost = 1e300;

  // The `whole` most frequent pairs, (0, 0), and the `halves` best of (e, 0) and (0, e).
  Symbols(const std::vector<int>& order, int whole, const std::vector<std::pair<double, int>>& halves, int half_count)
      : pairs(order.begin(), order.begin() + whole), index(65536, -1) {
    pairs.push_back(0);
    for (int i = 0; i < half_count; i++) pairs.push_back(halves[i].second);
    for (size_t i = 0; i < pairs.size(); i++) index[pairs[i]] = (int)i;
  }
  Symbols() = default;

  // What stands for a pair without a symbol of its own, and which exponents it gets wrong.
  struct Fallback {
    int symbol;
    bool wrong0, wrong1;
  };
  Fallback fallback(int pair) const {
    const int e0 = pair >> 8, e1 = pair & 255;
    if (e0 && e1 && index[e0 << 8] >= 0) return {index[e0 << 8], false, true};
    if (e0 && e1 && index[e1] >= 0) return {index[e1], true, false};
    return {index[0], true, true};
  }

  void weigh(const std::vector<uint32_t>& counts, int whole, const std::vector<int>& rest) {
    std::vector<double> weights(pairs.size(), 0.25);  // never zero: every symbol needs a code
    for (int i = 0; i <= whole; i++) weights[i] += counts[pairs[i]];
    double repairs = 0;
    for (const int pair : rest) {
      const Fallback instead = fallback(pair);
      weights[instead.symbol] += counts[pair];
      // A wrong exponent that is zero needs no repair: all that is wrong decodes to zero.
      repairs += ((instead.wrong0 && pair >> 8) + (instead.wrong1 && pair & 255)) * (double)counts[pair];
    }
    lengths = limited_lengths(weights, 8);
    bits = repairs * 32, cost = repairs * REPAIR_COST;
    for (size_t i = 0; i < weights.size(); i++) bits += weights[i] * lengths[i], cost += weights[i] * lengths[i];
  }
};

// Tries numbers of symbols and keeps the cheapest choice.
inline Symbols choose_symbols(const std::vector<uint32_t>& counts) {
  std::vector<int> order;  // pairs that may have a symbol, most frequent first; (0, 0) always has one
  for (int pair = 1; pair < 65536; pair++)
    if (counts[pair] && (pair >> 8) != 255 && (pair & 255) != 255) order.push_back(pair);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return counts[a] > counts[b]; });
  Symbols best;
  for (int asked = 0; asked <= 208; asked += 8) {
    const int whole = std::min<int>(asked, order.size());
    std::vector<char> has_symbol(65536, 0);
    has_symbol[0] = 1;
    for (int i = 0; i < whole; i++) has_symbol[order[i]] = 1;
    // What is left, by its first and by its second exponent.
    std::vector<int> rest;
    std::vector<double> first(256, 0), second(256, 0);
    for (int pair = 0; pair < 65536; pair++) {
      if (!counts[pair] || has_symbol[pair]) continue;
      rest.push_back(pair);
      if ((pair >> 8) != 255) first[pair >> 8] += counts[pair];
      if ((pair & 255) != 255) second[pair & 255] += counts[pair];
    }
    std::vector<std::pair<double, int>> halves;
    for (int e = 1; e < 255; e++) {
      if (first[e] && !has_symbol[e << 8]) halves.push_back({first[e], e << 8});
      if (second[e] && !has_symbol[e]) halves.push_back({second[e], e});
    }
    std::stable_sort(halves.begin(), halves.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
    for (const int half_count : {0, 2, 4, 6, 8, 10, 12, 16}) {
      if (half_count > (int)halves.size() || whole + half_count + 1 > 250) break;
      Symbols symbols(order, whole, halves, half_count);
      symbols.weigh(counts, whole, rest);
      if (symbols.cost < best.cost) best = std::move(symbols);
    }
    if (whole < asked) break;
  }
  return best;
}

inline CodeOfPairs make_code_of_pairs(const std::vector<uint32_t>& counts) {
  const Symbols symbols = choose_symbols(counts);
  const int n = (int)symbols.pairs.size();
  double pairs = 0;
  for (const uint32_t count : counts) pairs += count;
  CodeOfPairs out{std::vector<uint16_t>(65536, 0), std::vector<uint32_t>(256, 0), 0, n, symbols.bits / pairs / 2};

  // Canonical codes, by length and then in the order of the symbols, bits reversed: decoding takes the lowest first.
  std::vector<int> by_length(n);
  for (int i = 0; i < n; i++) by_length[i] = i;
  std::stable_sort(by_length.begin(), by_length.end(),
                   [&](int a, int b) { return symbols.lengths[a] < symbols.lengths[b]; });
  std::vector<uint16_t> word(n);
  uint32_t code = 0;
  int length = symbols.lengths[by_length[0]];
  for (const int i : by_length) {
    code <<= symbols.lengths[i] - length;
    length = symbols.lengths[i];
    uint32_t reversed = 0;
    for (int bit = 0; bit < length; bit++) reversed |= (code >> bit & 1) << (length - 1 - bit);
    word[i] = (uint16_t)(reversed | length << 8);
    const uint32_t e0 = symbols.pairs[i] >> 8, e1 = symbols.pairs[i] & 255;
    for (uint32_t k = 0; k < (256u >> length); k++) out.table[k << length | reversed] = e0 << 7 | e1 << 23 | length;
    code++;
  }
  for (uint32_t& entry : out.table)
    if (!entry) entry = 8;  // never met, in the code of one symbol: must still go on

  for (int pair = 0; pair < 65536; pair++) {
    if (symbols.index[pair] >= 0) {
      out.codes[pair] = word[symbols.index[pair]];
    } else {
      const Symbols::Fallback instead = symbols.fallback(pair);
      out.codes[pair] = (uint16_t)(word[instead.symbol] | instead.wrong0 << 12 | instead.wrong1 << 13);
    }
  }
  const auto shortest = std::min_element(symbols.lengths.begin(), symbols.lengths.end());
  out.filler = symbols.pairs[shortest - symbols.lengths.begin()];
  return out;
}

}  // namespace bench
