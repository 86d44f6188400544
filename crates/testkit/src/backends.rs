//! What a test needs of the machine that it runs on. Where it is missing, the test says so plainly and is skipped; with
//! `KARST_DEMAND_BACKENDS` it fails instead, so that nothing is skipped by accident: `1` is what `make test` sets, after
//! `scripts/install-dependencies` and as root; `all` demands also what not every kernel has, as in the lab.
//!
//! Of std only: crates below this one take the file by its path.
#![allow(dead_code)] // each program of tests uses some of it

use std::io::Write;

/// What no package brings: kernels, file systems and settings differ. All that `make test` may skip stands here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Optional {
    /// Loop devices, on which file systems are mounted.
    LoopDevices,
    /// Limits of the rates of disks, and a block device below the tests' directory.
    BlockRates,
    /// Overlays whose layers are mapped: by kernel and file system.
    MappedOverlays,
    /// The module of ZFS.
    Zfs,
    /// Device mapper, of which LVM is made.
    DeviceMapper,
    /// virtiofsd as it is written today: a package of Debian 13 and Ubuntu 24.04, and none of Debian 12.
    Virtiofsd,
    /// FAT.
    Fat,
    /// Limits of projects, on ext4 and on XFS.
    ProjectQuotas,
    /// A machine without a policy of its own in `/etc/karst`, which tests do not touch.
    NoPolicy,
}

impl Optional {
    fn text(self) -> &'static str {
        match self {
            Self::LoopDevices => "this kernel offers no loop devices here",
            Self::BlockRates => "there is no block device below, or no controller of its rates",
            Self::MappedOverlays => "this kernel and file system have no overlays with mapped layers",
            Self::Zfs => "this kernel has no ZFS, or the tests are not root's",
            Self::DeviceMapper => "this kernel has no device mapper, or the tests are not root's",
            Self::Virtiofsd => "this host has no virtiofsd (no package of Debian 12 brings it)",
            Self::Fat => "this kernel has no FAT, or no loop devices",
            Self::ProjectQuotas => "this kernel has no project quotas on this file system",
            Self::NoPolicy => "this machine has a policy of its own in /etc/karst",
        }
    }
}

/// Does a machine fail on which something is missing, optional or not?
fn fails(optional: bool) -> bool {
    demands(std::env::var("KARST_DEMAND_BACKENDS").ok().as_deref(), optional)
}

/// The same, where `KARST_DEMAND_BACKENDS` says `demanded`.
fn demands(demanded: Option<&str>, optional: bool) -> bool {
    match demanded {
        None | Some("") => false,
        Some("all") => true,
        Some(_) => !optional,
    }
}

fn say(why: &str) {
    let thread = std::thread::current();
    let line = format!("skipped: {}: {why}\n", thread.name().unwrap_or("a test"));
    // Not by a macro: of a test that passes nothing is shown of what those print. Nobody reads it, where this fails.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// `what` is missing that every machine can have: a program, a right.
///
/// # Panics
/// Where backends are demanded.
#[track_caller]
pub fn missing(what: &str) {
    let how = "run as root, after `scripts/install-dependencies runtime build test`";
    assert!(!fails(false), "{what}; {how}, or with an empty KARST_DEMAND_BACKENDS");
    say(&format!("{what}; {how}"));
}

/// Something is missing that not every machine can have.
///
/// # Panics
/// Where all is demanded.
#[track_caller]
pub fn absent(what: Optional) {
    assert!(!fails(true), "{}, where all is demanded", what.text());
    say(what.text());
}

/// Is this root? Says so where it is not.
#[track_caller]
pub fn root() -> bool {
    // The owner of a process' own directory: without a crate for the call.
    let uid = std::fs::metadata("/proc/self").map(|m| std::os::unix::fs::MetadataExt::uid(&m));
    let root = matches!(uid, Ok(0));
    if !root {
        missing("root is needed");
    }
    root
}

#[test]
fn what_is_missing_fails_where_it_is_demanded() {
    for (value, needed, optional) in
        [(None, false, false), (Some(""), false, false), (Some("1"), true, false), (Some("all"), true, true)]
    {
        assert_eq!((demands(value, false), demands(value, true)), (needed, optional), "{value:?}");
    }
}
