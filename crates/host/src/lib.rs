//! The one crate that executes programs, mounts, talks netlink and writes system files.
//!
//! Every call is typed (`host.run(Program::Nft, ..)`), never a shell line: a fixed table of programs, argv only, a cleared
//! environment, a timeout and an output cap. Errors carry argv, exit code and stderr as private context.
#![allow(clippy::disallowed_methods)] // this crate is the real world

pub mod affinity;
pub mod btrfs;
pub mod cgroup;
pub mod device_mapper;
pub mod exec;
pub mod fs;
pub mod link;
pub mod memory;
pub mod mount;
pub mod mountns;
pub mod moves;
pub mod neighbours;
pub mod netlink;
pub mod netns;
pub mod nft;
pub mod nic;
pub mod numa;
pub mod overlay;
pub mod owners;
pub mod packet_log;
pub mod process;
pub mod project_quota;
pub mod sandbox;
mod seccomp;
pub mod shared_limit;
pub mod sockets;
pub mod sysctl;
pub mod tap;
pub mod zvol;

pub use exec::{Command, Output, Program, guest_agent, run};

#[cfg(test)]
#[path = "../../testkit/src/backends.rs"]
mod backends;
