//! The protocol on `keeper.sock`, a `SOCK_SEQPACKET` unix socket: one message is one packet of at most [`MAX`] bytes.
//!
//! Request: `version: u8, operation: u8, body`. Reply: `version: u8, code: u8, body`; each request has exactly one reply,
//! in order. A watcher also receives one packet with code [`code::EVENT`] when the guest ended, and end-of-file when the
//! keeper is gone. Numbers are little-endian. Texts are UTF-8. An error's body is its text.
//!
//! | operation | body | body of the reply |
//! |---|---|---|
//! | `HELLO` | – (any version is accepted) | oldest and newest version spoken (2 bytes), then the status text |
//! | `STATUS` | – | the status text ([`crate::status`]) |
//! | `WATCH` | – | the status text; later one `EVENT` with the last status |
//! | `ATTACH` | `flags: u8` (1: end the attachment before) | – and one descriptor: a stream socket of the console |
//! | `RESIZE` | `columns: u16, rows: u16` | – |
//! | `SIGNAL` | `signal: u8` | – (sent to the main process by pidfd) |
//! | `DEADLINE` | `at: u64`, nanoseconds of `CLOCK_BOOTTIME`, 0 clears | – |
//! | `CLEAR_LOG` | – | – |
//! | `MARK` | `requested: u8` ([`crate::Requested`]) | – (who asked for the end; kept in the status) |
//!
//! The same packets travel on the launch socket, which is the keeper's standard input: the client sends one packet `F`
//! with the descriptors to hand on, the keeper answers one reply when the main process was executed or could not be.

/// The version spoken here.
pub const VERSION: u8 = 1;
/// The oldest version still understood.
pub const OLDEST: u8 = 1;
/// Largest packet.
pub const MAX: usize = 16 * 1024;
/// First byte of the packet on the launch socket.
pub const LAUNCH: u8 = b'F';
/// Most descriptors that can be handed on.
pub const MAX_FDS: usize = 192;
/// Flag of `ATTACH`: end the attachment before.
pub const ATTACH_FORCE: u8 = 1;

/// Operations.
pub mod op {
    /// Versions and status.
    pub const HELLO: u8 = 0;
    /// Status.
    pub const STATUS: u8 = 1;
    /// Status, and an event at the end.
    pub const WATCH: u8 = 2;
    /// Attach to the console.
    pub const ATTACH: u8 = 3;
    /// New size of the console.
    pub const RESIZE: u8 = 4;
    /// Signal to the main process.
    pub const SIGNAL: u8 = 5;
    /// Absolute deadline.
    pub const DEADLINE: u8 = 6;
    /// Empty the console log.
    pub const CLEAR_LOG: u8 = 7;
    /// Who asked for the end.
    pub const MARK: u8 = 8;
}

/// Codes of replies.
pub mod code {
    /// Done.
    pub const OK: u8 = 0;
    /// Somebody else is attached.
    pub const BUSY: u8 = 1;
    /// Malformed, or of a version that is not spoken.
    pub const BAD: u8 = 2;
    /// Not possible with this guest.
    pub const UNSUPPORTED: u8 = 3;
    /// The guest has ended.
    pub const GONE: u8 = 4;
    /// The system refused.
    pub const FAILED: u8 = 5;
    /// Unasked: the guest ended; the body is the last status.
    pub const EVENT: u8 = 128;
}
