//! What exists in Karst: instances, devices, volumes, snapshots, pools, networks, profiles, projects, nodes, images,
//! operations, principals and permissions; typed ids, sizes and states with their legal transitions; and the table of
//! configuration keys.
//!
//! Invariants: no IO, no async, no clock and no randomness here. Records refer to each other by UUID only; names are
//! index keys. Strings that users wrote are parsed once, at the edge, into the typed specifications of this crate.

pub mod access;
pub mod application;
pub mod applied;
pub mod audit;
pub mod backup;
pub mod board;
pub mod checkpoint;
pub mod device;
pub mod display;
pub mod dnsmasq;
pub mod encryption;
pub mod error;
pub mod firewall;
pub mod guest;
pub mod history;
pub mod id;
pub mod image;
pub mod instance;
mod key_row;
pub mod key_values;
pub mod keyboard;
pub mod keys;
mod keys_container;
pub mod keys_machine;
pub mod label;
pub mod layer;
pub mod maximum;
pub mod memory;
pub mod name;
pub mod network;
pub mod network_life;
pub mod network_names;
pub mod network_ports;
pub mod news;
pub mod node;
pub mod oci;
pub mod operation;
pub mod options;
pub mod pool_life;
pub mod preset;
pub mod profile;
pub mod project;
pub mod registry;
pub mod schedule;
pub mod screens;
pub mod secret;
pub mod server_keys;
pub mod signal;
pub mod size;
pub mod snapshot;
pub mod spec;
pub mod storage;
pub mod syscalls;
pub mod template;
pub mod threads;
pub mod trust;
pub mod uplink;
pub mod warning;

pub use error::{Error, ErrorKind, Missing, Result};
pub use id::*;
pub use name::Name;
pub use size::ByteSize;

/// Free-form user configuration, as written (`limits.memory` -> `1GiB`), in key order.
pub type Config = std::collections::BTreeMap<String, String>;
