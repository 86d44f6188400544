//! The real agent: resolves ids to things of this machine, applies the host's policy, and lets the drivers do the work.
//!
//! Control names things by UUID only. Every id is looked up in root's own registry or in a driver's; names that must go
//! outside DIR (interfaces, bridges) are checked to be this daemon's. Nothing of a client's text becomes part of a path or a
//! command line here.
#![allow(clippy::disallowed_methods)] // the agent of a real machine lives in the real world

mod agent;
mod audit;
mod backup_room;
mod backups;
mod block_pools;
mod bytes;
mod calls;
mod check;
mod checkpoints;
mod copies;
mod descriptions;
mod drives;
mod dumps;
mod facts;
mod given;
mod history;
mod host_paths;
pub mod ids;
mod images;
mod kernel;
mod keys;
mod layers;
mod logs;
mod machines;
mod memory;
mod monitor;
mod nics;
mod nodes;
mod outputs;
mod policy;
mod pool_growth;
mod pool_kinds;
mod pool_use;
mod pools;
mod ports;
mod proxies;
mod publish;
mod purge;
mod reach;
mod registry;
mod render;
mod reopen;
mod resources;
mod samples;
mod sessions;
mod staging;
mod storage;
mod trees;

pub use agent::{RealAgent, RealOptions};
pub use backup_room::BackupLimits;
pub use policy::{HostPolicy, RecipeSources};
pub use registry::set_damaged_aside;
pub use staging::UploadLimits;

#[cfg(test)]
#[path = "../../testkit/src/backends.rs"]
mod backends;
