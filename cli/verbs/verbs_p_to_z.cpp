// Verbs that are compiled together, as those in verbs_a_to_l.cpp.
#include "verbs/plan.cpp"  // NOLINT(bugprone-suspicious-include)
#include "verbs/run.cpp"   // NOLINT(bugprone-suspicious-include)
#include "verbs/tune.cpp"  // NOLINT(bugprone-suspicious-include)
