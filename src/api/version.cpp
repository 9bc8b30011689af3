// A source of the shared library alone: the rest comes in whole from the static one.
#include "widehead/widehead.h"

const char* wh_version(void) { return WIDEHEAD_VERSION; }
