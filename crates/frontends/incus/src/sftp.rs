//! An SFTP server (protocol version 3, draft-ietf-secsh-filexfer-02) over the engine's file calls: `incus file` speaks
//! it on an upgraded connection (`GET /1.0/instances/NAME/sftp`, `Upgrade: sftp`).
//!
//! The engine reads and writes whole files as streams, so handles are streams too: reads and writes come in order, as
//! every known client sends them; a jump is refused rather than done wrongly.

mod packet;
mod server;

pub use server::{Files, Opened, Reader, Write, Writer, absolute, serve};

#[cfg(test)]
mod tests;
