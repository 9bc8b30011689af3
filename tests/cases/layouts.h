// The same problems where an engine has them: queries and keys packed, keys in pages.
#pragma once

#include <random>

#include "cases.h"

namespace wh {

// Gives a dense case a layout that is not: sequences of lengths of their own, among them none at
// all and those around edges of tiles and pages, tables in random order, pages that sequences
// share, and entries of the table and tokens that are no sequence's and hold anything.
void draw_layout(Case& c, std::mt19937_64& random);

}  // namespace wh
