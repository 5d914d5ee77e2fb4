// Which instruction sets this processor has, and which one is in use.
#pragma once

namespace hav {

// See hav_supported_isas and hav_select_isa.
const char* supported_isas();
bool select_isa(const char* name);

}  // namespace hav
