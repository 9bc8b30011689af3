// How tiles of Q, K, V and P lie in shared memory: panels of 64 columns, [rows][64] of a 16-bit
// type, 128 bytes a row, as TMA swizzles them and wgmma takes them.
#pragma once

namespace wh::cuda {

constexpr int kPanelColumns = 64;
constexpr int kPanelRowBytes = kPanelColumns * 2;
constexpr int kStepColumns = 16;  // k of one wgmma
constexpr int kPanelSteps = kPanelColumns / kStepColumns;

constexpr int panels_of(int dim) { return (dim + kPanelColumns - 1) / kPanelColumns; }
constexpr int panel_bytes(int rows) { return rows * kPanelRowBytes; }

// The byte of a chunk of 8 columns, the 16 bytes that the swizzle moves, of a row in panels of
// `panel_rows` rows.
constexpr int chunk_offset(int row, int chunk, int panel_rows) {
  return panel_bytes(chunk / 8 * panel_rows + row) + ((chunk % 8) ^ (row % 8)) * 16;
}

// What a block may have of shared memory where `blocks` share a multiprocessor: of its 228 KB each
// costs one more.
constexpr int most_shared_bytes(int blocks = 1) { return 228 * 1024 / blocks - 1024; }

}  // namespace wh::cuda
