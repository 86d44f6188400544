//! The host agent: the trait that the engine calls, its wire protocol, the client, and a simulation.
//!
//! Between control (no privileges) and host (root) ids travel: pool, volume, network, image, instance, device. No argv, nft
//! text or environment of host processes is on this wire. Paths of the host (disks, device nodes, pools, files for memory), its
//! interfaces, lines of `raw.lxc` and `raw.dnsmasq` and commands of QEMU's monitor are, as a user named them: the host grants each by
//! its policy (`host-policy.toml`) or refuses it. Bytes (exec, console, files, images) flow through descriptors that the host
//! opened and passed; the host never receives one.

pub mod acl_logs;
pub mod asks;
pub mod backups;
pub mod calls;
pub mod checkpoints;
pub mod client;
#[cfg(feature = "testing")]
pub mod contract;
pub mod copies;
pub mod descriptions;
pub mod displays;
pub mod epoch;
pub mod events;
pub mod keys;
pub mod lanes;
pub mod layers;
pub mod memory;
pub mod names;
pub mod neighbours;
pub mod outputs;
pub mod pools;
pub mod publish;
pub mod resources;
pub mod server;
pub mod simulated;
pub mod thresholds;
pub mod wire;

pub use acl_logs::*;
pub use asks::*;
pub use backups::*;
pub use calls::*;
pub use checkpoints::*;
pub use client::Client;
pub use copies::*;
pub use descriptions::*;
pub use displays::*;
pub use epoch::EpochGuard;
pub use events::EventHub;
pub use keys::*;
pub use lanes::Lane;
pub use layers::*;
pub use memory::*;
pub use names::{check_host_interface, host_interface};
pub use neighbours::*;
pub use outputs::*;
pub use publish::*;
pub use server::{ServerOptions, serve};
pub use simulated::{Fault, SimulatedAgent, SimulatedOptions};
pub use thresholds::*;
