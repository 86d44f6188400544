//! What rules of network ACLs log, kept by the host on which they do: bounded, and gone with the ACL.

use karst_model::AclId;
use serde::{Deserialize, Serialize};

/// Most bytes of a log that an answer carries; a host keeps no more either.
pub const ACL_LOG_BYTES: u32 = 512 << 10;

/// A log to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AclLogRead {
    /// Whose.
    pub acl: AclId,
    /// At most so many bytes, the newest; whole lines.
    pub max: u32,
}
