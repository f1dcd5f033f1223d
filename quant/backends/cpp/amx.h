// The products in tiles of AMX: one instruction multiplies 16 pixels with 16 outputs over 64 inputs.
//
// A tile of weights is what a block holds, as it lies there. In a tile of codes a row is a pixel, read
// from the map as it is. Sums and results are those of tiles.h, to the bit.

#pragma once

#include "tiles.h"

#ifdef INSTRUCTION_SET

constexpr long PIXELS = 16;            // of a tile, at most
constexpr long AMX_OUTPUTS = 2 * BLOCK;  // of two tiles of weights

#ifdef WITH_AMX

// Whether the operating system lets this process use tiles; asked once.
bool amx_allowed();

// How many of the `quads` groups of four inputs in a row of the kernel a tile takes; 0: tiles cannot
// be used, or are not worth it.
long amx_depth(long quads);

// Tiles of so many pixels, for the calling thread, as long as this lives.
class Amx {
 public:
  Amx(long pixels, long depth);
  ~Amx();
  Amx(const Amx&) = delete;

  // count: 1 or 2 tiles of pixels, under up to AMX_OUTPUTS outputs from `first` on; w: their weights.
  void run(const Walk& walk, const Pixels* tiles, long count, const int8_t* w, const Finish& end,
           long first) const;

 private:
  const long depth;
};

#else

inline bool amx_allowed() { return false; }
inline long amx_depth(long) { return 0; }

struct Amx {
  Amx(long, long) {}
  void run(const Walk&, const Pixels*, long, const int8_t*, const Finish&, long) const {}
};

#endif
#endif
