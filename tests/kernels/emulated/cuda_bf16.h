// In place of the toolkit's header.
#pragma once
#include "gpu.hpp"
