// The delta rule: the recurrence with its correction.
#include "../dispatch.h"

HASTEN_EXPORT(delta_rule, RecurrenceArguments)(const RecurrenceArguments& in) { return chunks<true>(in); }

HASTEN_EXPORT(delta_rule_step, RecurrenceArguments)(const RecurrenceArguments& in) { return steps<true>(in); }
