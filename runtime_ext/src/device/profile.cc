// Names of what the host does for a device.
#include "device/profile.h"

namespace cfmoe::device {

const char* host_part_name(HostPart part) {
  switch (part) {
    case HostPart::kOther: break;
    case HostPart::kRecord: return "record";
    case HostPart::kSubmit: return "submit";
    case HostPart::kWait: return "wait";
    case HostPart::kRoute: return "route";
    case HostPart::kExperts: return "experts";
  }
  return "other";
}

}  // namespace cfmoe::device
