//! Karst's agent inside virtual machines, and what it speaks with the host.
//!
//! [`wire`] and [`message`] are both sides' (the host's side is in `vm-qemu`); [`agent`] is the program; [`delivery`] is
//! how it gets into a guest. The guest may be hostile to the host and an old host's bytes may be in the guest's buffers,
//! so both decoders take any bytes, keep a bounded amount of them and never panic. Why it is as it is: ADR 0014.

// Inside the guest there is no `Env`: time and threads are real.
#![allow(clippy::disallowed_methods)]

pub mod agent;
pub mod delivery;
pub mod message;
pub mod wire;

/// Name of the virtio-serial port.
pub const PORT: &str = "org.karst.agent.0";
