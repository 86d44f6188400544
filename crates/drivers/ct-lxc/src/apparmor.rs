//! The AppArmor profile that confines all containers of a daemon: one, loaded once.
//!
//! Not liblxc's generated profiles: each container would have one of its own, which costs the parser up to a second at every
//! first start, and most of whose rules forbid what a container in a user namespace of its own cannot do anyway. This one
//! keeps containers from each other's and the host's processes, and from the kernel's few files that do not ask who owns
//! them. It is named by the daemon, and the kernel forgets it with the next boot.

use karst_host::{Program, run};
use karst_model::{Error, Result};
use std::{path::Path, time::Duration};

const KERNEL: &str = "/sys/kernel/security/apparmor";

/// Time for the parser: a few milliseconds of work, on a machine that may be busy.
const PARSE: Duration = Duration::from_secs(60);

/// Name of the profile. Distributions confine `lxc-start` itself and let it change to `lxc-*` only.
pub(crate) fn profile(daemon_id: &str) -> String {
    format!("lxc-karst-{daemon_id}")
}

/// Is AppArmor on, may profiles be loaded here, and is its parser installed?
pub(crate) fn usable() -> bool {
    let enabled = std::fs::read_to_string("/sys/module/apparmor/parameters/enabled");
    enabled.is_ok_and(|s| s.trim() == "Y")
        && Path::new(KERNEL).join(".replace").exists()
        && Program::ApparmorParser.path().is_ok()
}

/// The profile. Grammar: apparmor.d(5).
fn text(daemon_id: &str) -> String {
    let name = profile(daemon_id);
    format!(
        "profile {name} flags=(attach_disconnected,mediate_deleted) {{
  file,
  capability,
  network,
  unix,
  dbus,
  mount,
  remount,
  umount,
  pivot_root,
  change_profile -> {name},
  # From the host whatever it wants; among containers' processes nothing across a user namespace, which the kernel sees to.
  signal (receive),
  signal peer={name},
  ptrace (readby, tracedby),
  ptrace peer={name},
  # What user namespaces do not guard, or guard by the mode of a file alone.
  deny /proc/sysrq-trigger rwklx,
  deny /proc/kcore rwklx,
  deny /proc/kmem rwklx,
  deny /proc/mem rwklx,
  deny /proc/sys/kernel/core_pattern wklx,
  deny /proc/sys/kernel/modprobe wklx,
  deny /proc/sys/fs/binfmt_misc/** wklx,
  deny /sys/firmware/efi/efivars/** rwklx,
  deny /sys/kernel/security/** rwklx,
  deny /sys/kernel/debug/** rwklx,
  deny /sys/kernel/tracing/** rwklx,
}}
"
    )
}

/// Loads the profile, in place of an older one of its name.
///
/// # Errors
/// Internal, with the parser's words.
pub(crate) async fn load(daemon_id: &str) -> Result<()> {
    let loaded = run(Program::ApparmorParser)
        .args(["--replace", "--skip-cache", "--quiet"])
        .stdin(text(daemon_id))
        .timeout(PARSE)
        .ok()
        .await;
    loaded.map(drop).map_err(|e| {
        Error::internal(
            "the AppArmor profile for containers could not be loaded",
            format!("{e}: {}", e.context.as_deref().unwrap_or_default()),
        )
    })
}

/// Removes the profile of a daemon; fine when it is not loaded. Nothing that it confines may run any more.
///
/// # Errors
/// Internal, with the parser's words.
pub async fn unload(daemon_id: &str) -> Result<()> {
    let mark = format!("{} (", profile(daemon_id));
    let loaded = std::fs::read_to_string(Path::new(KERNEL).join("profiles")).unwrap_or_default();
    if usable() && loaded.lines().any(|l| l.starts_with(&mark)) {
        let parser = run(Program::ApparmorParser).args(["--remove", "--quiet"]).stdin(text(daemon_id));
        parser.timeout(PARSE).ok().await?;
    }
    Ok(())
}

/// Loaded profiles that carry the daemon's mark and are not the one that it uses.
pub fn strays(daemon_id: &str) -> Vec<String> {
    let loaded = std::fs::read_to_string(Path::new(KERNEL).join("profiles")).unwrap_or_default();
    strays_in(&loaded, daemon_id)
}

/// In the kernel's list: `NAME (MODE)` a line.
fn strays_in(loaded: &str, daemon_id: &str) -> Vec<String> {
    let own = profile(daemon_id);
    let names = loaded.lines().filter_map(|l| Some(l.rsplit_once(" (")?.0));
    let marked = |n: &&str| n.strip_prefix(&own).is_some_and(|rest| !rest.is_empty());
    names.filter(marked).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn foreign_and_own_profiles_are_told_apart() {
        let loaded = "lxc-karst-ab12cd (enforce)\nlxc-karst-ab12cd-old (enforce)\n\
                      lxc-karst-ab12cd//&:x:unconfined (complain)\nlxc-karst-ffffff-old (enforce)\nlibvirt (enforce)\n";
        let found = super::strays_in(loaded, "ab12cd");
        assert_eq!(found, ["lxc-karst-ab12cd-old", "lxc-karst-ab12cd//&:x:unconfined"]);
    }

    /// The parser compiles it, where there is one: that needs no AppArmor in the kernel.
    #[tokio::test]
    async fn the_profile_is_well_formed() {
        use super::*;
        if Program::ApparmorParser.path().is_err() {
            eprintln!("skipped: no apparmor_parser here");
            return;
        }
        let parse = |text: String| async move {
            let parser = run(Program::ApparmorParser);
            let parser = parser.args(["--skip-kernel-load", "--skip-cache", "--skip-read-cache", "--quiet"]);
            parser.stdin(text).ok().await
        };
        parse(text("ab12cd")).await.unwrap();
        parse(text("ab12cd").replace("pivot_root,", "pivot_rot,")).await.unwrap_err();
    }
}
