// What `check` tries: every kind of weights, shapes that end within a tile, a unit and a stage, every type of
// activations, padded and unaligned rows, packing by blocks of rows.
#pragma once
#include "check.cuh"
#include "pair.cuh"
#include "staged.cuh"

namespace bench {

// With real shapes, printed one by one.
inline std::vector<Case> real_cases(bool pair) {
  if (pair) {
    std::vector<Case> cases;
    for (const Kind kind : {NORMAL, STUDENT_T, ROW_COL, SPECIALS, SPARSE})
      cases.push_back({1024, 4096, kind, {1, 8, 16}});
    cases.push_back({512, 14336, ROW_COL, {1, 8, 16}});
    cases.push_back({4096, 2048, STUDENT_T, {1, 8}, F16});
    cases.push_back({2048, 5632, STUDENT_T, {1, 5}, F32});
    return cases;
  }
  std::vector<Case> cases = {
      {1024, 4096, NORMAL, {1, 8, 16, 32, 64}},
      {1024, 4096, STUDENT_T, {1, 8, 16}},
      {1024, 4096, ROW_COL, {1, 64}},
      {1024, 4096, SPECIALS, {1, 8}},
      {512, 14336, ROW_COL, {1, 8, 16, 32, 64}},
      {4096, 2048, STUDENT_T, {1, 8, 33}, F16},
      {2048, 5632, STUDENT_T, {1, 5, 21}, F32},
  };
  cases[2].bias = cases[3].bias = false;
  return cases;
}

inline std::vector<Case> odd_cases(bool pair) {
  std::vector<std::pair<int, int>> shapes = {{1, 1},      {1, 4096},  {3, 7},      {16, 128},  {17, 129},
                                             {100, 1000}, {600, 600}, {130, 2050}, {37, 9000}, {3000, 64}};
  if (pair) shapes.push_back({2000, 700});
  const std::vector<int> batches =
      pair ? std::vector<int>{1, 2, 3, 8, 9, 16} : std::vector<int>{1, 2, 3, 8, 9, 17, 33, 64};
  std::vector<Case> cases;
  for (const auto& [rows, cols] : shapes)
    for (int kind = 0; kind < KINDS; kind++) {
      const bool odd = kind % 2;
      cases.push_back(
          {rows, cols, (Kind)kind, batches, (Type)(kind % 3), false, odd ? 3 : 0, odd ? 1 : 0, odd, 48, false});
    }
  for (const Type type : {BF16, F16, F32})
    for (const Kind kind : {NORMAL, SPECIALS, NON_FINITE, SPARSE}) {
      cases.push_back({600, 600, kind, pair ? std::vector<int>{1, 7, 16} : std::vector<int>{1, 7, 16, 20, 32}, type,
                       true, 0, 0, true, 48, false});
      cases.push_back({70, 5000, kind, pair ? std::vector<int>{1, 4, 8} : std::vector<int>{1, 4, 64}, type, true, 1, 1,
                       true, 48, false});
    }
  // Activations that do not lie well in the range of f16.
  for (const Type type : {BF16, F16, F32})
    for (const float scale : {1e-5f, 1e4f})
      cases.push_back({100, 1000, NORMAL, pair ? std::vector<int>{1, 7} : std::vector<int>{1, 2, 7, 16}, type, false, 0,
                       0, true, 48, false, scale});
  return cases;
}

// Few and small: for compute-sanitizer, which slows everything down a hundredfold.
inline std::vector<Case> small_cases(bool pair) {
  if (pair)
    return {{50, 1200, SPECIALS, {1, 9}, BF16, false, 3, 1, true, 32, false},
            {33, 300, STUDENT_T, {2, 8}, F16, true, 0, 0, true, 16, false},
            {300, 2300, NORMAL, {1, 8}, BF16, false, 0, 0, true, 16, false}};
  return {{50, 1200, SPECIALS, {1, 9, 20, 40}, BF16, false, 3, 1, true, 32, false},
          {50, 1200, STUDENT_T, {1, 9, 20, 40}, BF16, false, 3, 1, true, 32, false},
          {50, 1200, ZEROS, {1, 9, 20, 40}, BF16, false, 3, 1, true, 32, false},
          {33, 300, STUDENT_T, {2, 12}, F16, true, 0, 0, true, 16, false},
          {40, 2300, RANDOM_BITS, {1, 40}, BF16, false, 0, 0, true, 16, false}};
}

template <class M>
void check_layout(const Device& device, bool small, Tally& tally) {
  constexpr bool PAIR = std::is_same_v<M, PairMatrix>;
  M::prepare(device);
  std::vector<Case> cases = small ? small_cases(PAIR) : real_cases(PAIR);
  if (!small)
    for (Case& c : odd_cases(PAIR)) cases.push_back(std::move(c));
  for (Case& c : cases) {
    if constexpr (M::BLOCKS) c.cols = taper::ceil_div(c.cols, M::LEN) * M::LEN;  // rows are whole blocks
    Checker<M>(device, c, tally).run();
  }
}

}  // namespace bench
