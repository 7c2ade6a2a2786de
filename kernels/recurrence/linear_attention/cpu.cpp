// Linear attention: the recurrence without a correction.
#include "../dispatch.h"

HASTEN_EXPORT(linear_attention, RecurrenceArguments)(const RecurrenceArguments& in) { return chunks<false>(in); }

HASTEN_EXPORT(linear_attention_step, RecurrenceArguments)(const RecurrenceArguments& in) { return steps<false>(in); }
