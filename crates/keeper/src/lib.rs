//! Formats that the keeper and its client share: the specification file, the status file and the socket's protocol.
//!
//! Keepers outlive upgrades of the daemon, so each format carries a version and only ever grows: a new client must be
//! able to talk to a keeper that was started by any older one. No dependency beyond std here.

pub mod attach;
pub mod guest_data;
pub mod protocol;
pub mod spec;
pub mod status;
mod text;

pub use spec::{Console, Spec};
pub use status::{Exit, Requested, State, Status};

/// Names of the files in a guest's state directory that belong to its keeper.
pub mod files {
    /// The specification, mode 0600; the only input besides the ids in argv.
    pub const SPEC: &str = "keeper.spec";
    /// Locked (flock, exclusive) while a keeper lives.
    pub const LOCK: &str = "keeper.lock";
    /// The status, replaced by rename at each change.
    pub const STATUS: &str = "keeper.status";
    /// The socket, `SOCK_SEQPACKET`, mode 0600.
    pub const SOCKET: &str = "keeper.sock";
    /// Newer part of the console log.
    pub const CONSOLE: &str = "console.log";
    /// Older part of the console log.
    pub const CONSOLE_OLD: &str = "console.log.1";
}
