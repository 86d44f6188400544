//! The AppArmor profile that confines all containers of a daemon: one, loaded once.
//!
//! Not liblxc's generated profiles: each container would have one of its own, which costs the parser up to a second at every
//! first start, and most of whose rules forbid what a container in a user namespace of its own cannot do anyway. This one
//! keeps containers from each other's and the host's processes, and from the kernel's few files that do not ask who owns
//! them. It is named by the daemon, and the kernel forgets it with the next boot.
//!
//! Privileged containers have another one, for in them root is the host's: it forbids what only that root may do, the settings
//! of the kernel that belong to no namespace, the file systems that show the kernel, and the ways around (proc and sysfs
//! mounted or bound elsewhere). Where it errs, it forbids too much.

use karst_host::{Program, run};
use karst_model::{Error, Result};
use std::{path::Path, time::Duration};

const KERNEL: &str = "/sys/kernel/security/apparmor";

/// Time for the parser: a few milliseconds of work, on a machine that may be busy.
const PARSE: Duration = Duration::from_secs(60);

/// What the name of the profile for privileged containers ends in.
const PRIVILEGED: &str = "-privileged";

/// Name of the profile. Distributions confine `lxc-start` itself and let it change to `lxc-*` only.
pub(crate) fn profile(daemon_id: &str, privileged: bool) -> String {
    format!("lxc-karst-{daemon_id}{}", if privileged { PRIVILEGED } else { "" })
}

/// Is AppArmor on, may profiles be loaded here, and is its parser installed?
pub(crate) fn usable() -> bool {
    let enabled = std::fs::read_to_string("/sys/module/apparmor/parameters/enabled");
    enabled.is_ok_and(|s| s.trim() == "Y")
        && Path::new(KERNEL).join(".replace").exists()
        && Program::ApparmorParser.path().is_ok()
}

/// The profile. Grammar: apparmor.d(5).
fn text(daemon_id: &str, privileged: bool) -> String {
    let name = profile(daemon_id, privileged);
    if privileged {
        return privileged_text(&name);
    }
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

/// Patterns of all paths but those at and below the directory `/WORD`.
fn all_but(word: &str) -> Vec<String> {
    let mut patterns: Vec<String> =
        (0..word.len()).map(|n| format!("/{}[^{}]*{{,/**}}", &word[..n], &word[n..=n])).collect();
    // Shorter and longer names that begin like it.
    patterns.extend((1..word.len()).map(|n| format!("/{}{{,/**}}", &word[..n])));
    patterns.push(format!("/{word}?*{{,/**}}"));
    patterns
}

fn privileged_text(name: &str) -> String {
    // What begins with neither is in both lists; a bind is allowed by one rule that matches.
    let elsewhere: Vec<String> = all_but("proc")
        .into_iter()
        .filter(|p| !p.starts_with("/[^"))
        .chain(all_but("sys").into_iter().filter(|p| !p.starts_with("/[^")))
        .chain(["/[^ps]*{,/**}".to_owned(), "/".to_owned()])
        .collect();
    let binds: String = elsewhere
        .iter()
        .flat_map(|from| ["bind", "rbind"].map(|kind| format!("  mount options=(rw, {kind}) {from},\n")))
        .collect();
    let spread: String = ["slave", "shared", "private", "unbindable"]
        .iter()
        .flat_map(|kind| ["", "r"].map(|deep| format!("  mount options=(rw, make-{deep}{kind}) -> **,\n")))
        .collect();
    format!(
        "profile {name} flags=(attach_disconnected,mediate_deleted) {{
  file,
  capability,
  network,
  unix,
  dbus,
  umount,
  pivot_root,
  change_profile -> {name},
  signal (receive),
  signal peer={name},
  ptrace (readby, tracedby),
  ptrace peer={name},
  # Proc and sysfs stand where the rules below see them.
  mount fstype=proc -> /proc/,
  mount fstype=sysfs -> /sys/,
  mount fstype=(autofs,cgroup,cgroup2,devpts,devtmpfs,hugetlbfs,mqueue,overlay,ramfs,tmpfs),
  mount fstype=(fuse,fuse.*,fuseblk,nfs,nfs4,cifs),
{binds}{spread}  remount /,
  remount /{{dev,proc,run,sys,tmp}}/{{,**}},
  # Settings of the kernel that belong to no namespace.
  deny /proc/{{kcore,kmem,mem,kallsyms,kpage*,sysrq-trigger,timer_list}} rwklx,
  deny /proc/{{acpi,bus,irq,scsi,mtrr}}{{,/**}} wklx,
  deny /proc/sys/{{abi,debug,dev,sunrpc,vm}}/** wklx,
  deny /proc/sys/fs/[^m]** wklx,
  deny /proc/sys/fs/m[^q]** wklx,
  deny /proc/sys/kernel/[^dhmns]** wklx,
  deny /proc/sys/kernel/d[^o]** wklx,
  deny /proc/sys/kernel/h[^o]** wklx,
  deny /proc/sys/kernel/hot** wklx,
  deny /proc/sys/kernel/m[^s]** wklx,
  deny /proc/sys/kernel/n[^s]** wklx,
  deny /proc/sys/kernel/s[^eh]** wklx,
  deny /proc/sys/kernel/sec** wklx,
  # Of the devices their own network interfaces; control groups.
  deny /sys/[^dfk]** wklx,
  deny /sys/devices/[^v]** wklx,
  deny /sys/devices/virtual/[^n]** wklx,
  deny /sys/f[^s]** wklx,
  deny /sys/fs/[^c]** wklx,
  deny /sys/kernel/** wklx,
  deny /sys/{{firmware/efi/efivars,fs/bpf,fs/pstore}}/** rwklx,
  deny /sys/kernel/{{debug,security,tracing,config}}/** rwklx,
}}
"
    )
}

/// Loads the profile, in place of an older one of its name.
///
/// # Errors
/// Internal, with the parser's words.
pub(crate) async fn load(daemon_id: &str, privileged: bool) -> Result<()> {
    let loaded = run(Program::ApparmorParser)
        .args(["--replace", "--skip-cache", "--quiet"])
        .stdin(text(daemon_id, privileged))
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

/// Removes the profiles of a daemon; fine when none is loaded. Nothing that they confine may run any more.
///
/// # Errors
/// Internal, with the parser's words.
pub async fn unload(daemon_id: &str) -> Result<()> {
    let loaded = std::fs::read_to_string(Path::new(KERNEL).join("profiles")).unwrap_or_default();
    for privileged in [false, true] {
        let mark = format!("{} (", profile(daemon_id, privileged));
        if usable() && loaded.lines().any(|l| l.starts_with(&mark)) {
            let parser = run(Program::ApparmorParser).args(["--remove", "--quiet"]);
            parser.stdin(text(daemon_id, privileged)).timeout(PARSE).ok().await?;
        }
    }
    Ok(())
}

/// Loaded profiles that carry the daemon's mark and are none of those that it uses.
pub fn strays(daemon_id: &str) -> Vec<String> {
    let loaded = std::fs::read_to_string(Path::new(KERNEL).join("profiles")).unwrap_or_default();
    strays_in(&loaded, daemon_id)
}

/// In the kernel's list: `NAME (MODE)` a line.
fn strays_in(loaded: &str, daemon_id: &str) -> Vec<String> {
    let own = profile(daemon_id, false);
    let names = loaded.lines().filter_map(|l| Some(l.rsplit_once(" (")?.0));
    let marked = |n: &&str| n.strip_prefix(&own).is_some_and(|rest| !matches!(rest, "" | PRIVILEGED));
    names.filter(marked).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn foreign_and_own_profiles_are_told_apart() {
        let loaded = "lxc-karst-ab12cd (enforce)\nlxc-karst-ab12cd-privileged (enforce)\nlxc-karst-ab12cd-old (enforce)\n\
                      lxc-karst-ab12cd//&:x:unconfined (complain)\nlxc-karst-ffffff-old (enforce)\nlibvirt (enforce)\n";
        let found = super::strays_in(loaded, "ab12cd");
        assert_eq!(found, ["lxc-karst-ab12cd-old", "lxc-karst-ab12cd//&:x:unconfined"]);
    }

    #[test]
    fn all_but_one_directory() {
        assert_eq!(
            super::all_but("sys"),
            ["/[^s]*{,/**}", "/s[^y]*{,/**}", "/sy[^s]*{,/**}", "/s{,/**}", "/sy{,/**}", "/sys?*{,/**}"]
        );
        let text = super::privileged_text("p");
        assert!(text.contains("(rw, bind) /pr[^o]*{,/**},") && !text.contains("(rw, bind) /[^p]*"), "{text}");
    }

    /// The parser compiles it, where there is one: that needs no AppArmor in the kernel.
    #[tokio::test]
    async fn the_profile_is_well_formed() {
        use super::*;
        if Program::ApparmorParser.path().is_err() {
            return crate::backends::missing("apparmor_parser is not installed");
        }
        let parse = |text: String| async move {
            let parser = run(Program::ApparmorParser);
            let parser = parser.args(["--skip-kernel-load", "--skip-cache", "--skip-read-cache", "--quiet"]);
            parser.stdin(text).ok().await
        };
        for privileged in [false, true] {
            parse(text("ab12cd", privileged)).await.unwrap();
            parse(text("ab12cd", privileged).replace("pivot_root,", "pivot_rot,")).await.unwrap_err();
        }
    }
}
