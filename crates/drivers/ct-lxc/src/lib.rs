//! System containers over liblxc's `lxc-start`.
//!
//! A container is a child of its keeper ([`karst_guest::keeper`]); its limits stand on a control group that it cannot
//! reach; programs and files inside are reached by the keeper's `--attach` helper. Nothing here outlives a call but a
//! watcher per running container.
#![allow(clippy::disallowed_methods)] // drivers live in the real world

pub mod apparmor;
mod attach;
mod balance;
mod config;
mod disks;
mod driver;
mod end;
mod ending;
mod files;
mod guest_api;
mod limits;
pub mod locks;
mod nics;
mod proc;
mod proxies;
mod record;
pub mod room;
mod seed;
mod spaces;

pub use config::{HostFeatures, render};
pub use driver::{LxcDriver, LxcOptions};

#[cfg(test)]
#[path = "../../../testkit/src/backends.rs"]
mod backends;
