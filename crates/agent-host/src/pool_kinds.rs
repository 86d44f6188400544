//! Which kinds of pools this host can have: by the programs that are installed, and by what its kernel has or can load.

use crate::{agent::blocking, policy::HostPolicy};
use karst_host::{Program, device_mapper, run};
use karst_model::{Error, Result, node::StorageDriver, storage::PoolKind};
use std::{fs::File, path::Path, time::Duration};
use tokio::sync::OnceCell;

/// What a kind needs.
struct Needs {
    programs: &'static [Program],
    /// A module of the kernel.
    module: Option<&'static str>,
}

fn needs(kind: PoolKind) -> Needs {
    match kind {
        PoolKind::Dir => Needs { programs: &[], module: None },
        PoolKind::Btrfs => Needs { programs: &[Program::MkfsBtrfs], module: Some("btrfs") },
        PoolKind::Zfs => Needs { programs: &[Program::Zpool, Program::Zfs], module: Some("zfs") },
        PoolKind::Lvm => Needs {
            programs: &[Program::Lvm, Program::ThinCheck, Program::MkfsExt4, Program::Resize2fs],
            module: Some("dm_thin_pool"),
        },
    }
}

/// Is a module there, loaded or built in?
fn loaded(module: &str) -> bool {
    // A file system that is built in may have no directory of its own.
    let systems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    Path::new("/sys/module").join(module).exists()
        || systems.lines().any(|line| line.split_whitespace().last() == Some(module))
}

/// Does this kernel's directory of modules have it?
fn loadable(module: &str) -> bool {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let below = Path::new("/lib/modules").join(release);
    let lists = ["modules.dep", "modules.builtin"].map(|list| std::fs::read_to_string(below.join(list)));
    lists.into_iter().flatten().any(|list| has_module(&list, module))
}

/// Is it in such a list? Files have dashes where names have underscores, and may be compressed.
fn has_module(list: &str, module: &str) -> bool {
    let files = list.lines().filter_map(|line| line.split(':').next()?.rsplit('/').next());
    files.filter_map(|file| file.split_once(".ko")).any(|(name, _)| name.replace('-', "_") == module)
}

/// What is missing for pools of a kind, with the fix.
fn missing(kind: PoolKind) -> Option<Error> {
    let needs = needs(kind);
    if let Some(e) = needs.programs.iter().find_map(|p| p.path().err()) {
        return Some(e);
    }
    let module = needs.module.filter(|module| !loaded(module) && !loadable(module))?;
    let fix = match kind {
        PoolKind::Zfs => "install the package zfs-dkms, until `modprobe zfs` succeeds",
        _ => "boot one that has it",
    };
    Some(Error::unsupported(format!("the kernel of this host has no module {module:?}; {fix}")))
}

/// Refuses a kind that this host cannot have. The host process may load no modules, and neither may its programs; but the
/// kernel does by itself when what they bring is asked for.
///
/// # Errors
/// Unsupported, naming what is missing.
pub(crate) async fn ready(kind: PoolKind) -> Result<()> {
    blocking(move || {
        if let Some(e) = missing(kind) {
            return Err(e);
        }
        let Some(module) = needs(kind).module.filter(|module| !loaded(module)) else { return Ok(()) };
        let comes = match kind {
            PoolKind::Zfs => File::open("/dev/zfs").is_ok(),
            PoolKind::Lvm => device_mapper::has_target("thin-pool").unwrap_or(false),
            // With the first mount.
            PoolKind::Dir | PoolKind::Btrfs => true,
        };
        if comes || loaded(module) {
            return Ok(());
        }
        Err(Error::unsupported(format!(
            "the kernel of this host has not loaded its module {module:?}; `modprobe {module}`, and name it in a file of \
             /etc/modules-load.d for the next boot"
        )))
    })
    .await
}

/// The versions of tools do not change while they are asked.
static LVM: OnceCell<String> = OnceCell::const_new();
static BTRFS: OnceCell<String> = OnceCell::const_new();

/// All kinds, with what this host lacks for each, or why it does not make them.
pub(crate) async fn all(policy: &HostPolicy) -> Vec<StorageDriver> {
    let asked = PoolKind::ALL.iter().map(|kind| (*kind, policy.check_pool_kind(*kind).err()));
    let asked: Vec<_> = asked.collect();
    let look = move || {
        let lacks = asked.into_iter().map(|(kind, trial)| (kind, missing(kind).or(trial)));
        Ok(lacks.collect::<Vec<_>>())
    };
    let mut all = vec![];
    for (kind, missing) in blocking(look).await.unwrap_or_default() {
        let version = if missing.is_some() { String::new() } else { version(kind).await };
        all.push(StorageDriver { kind, version, missing: missing.map(|e| e.message) });
    }
    all
}

async fn version(kind: PoolKind) -> String {
    match kind {
        PoolKind::Dir => "1".to_owned(),
        // Nothing is said before it is loaded.
        PoolKind::Zfs => {
            let said = std::fs::read_to_string("/sys/module/zfs/version").unwrap_or_default();
            said.trim().to_owned()
        }
        PoolKind::Lvm => said(&LVM, Program::Lvm, "version").await,
        PoolKind::Btrfs => said(&BTRFS, Program::MkfsBtrfs, "--version").await,
    }
}

async fn said(known: &OnceCell<String>, program: Program, argument: &str) -> String {
    let asked = known.get_or_try_init(|| async move {
        let out = run(program).arg(argument).timeout(Duration::from_secs(10)).ok().await?;
        Ok::<_, Error>(number(&String::from_utf8_lossy(&out)))
    });
    // One that does not answer is asked again.
    asked.await.cloned().unwrap_or_default()
}

/// The first number with a point in what a program says of itself.
fn number(text: &str) -> String {
    let words = text.split_whitespace().map(|w| w.trim_start_matches('v'));
    let mut numbers =
        words.map(|w| w.split(|c: char| !c.is_ascii_digit() && c != '.').next().unwrap_or_default());
    let is = |n: &&str| n.contains('.') && n.starts_with(|c: char| c.is_ascii_digit());
    numbers.find(is).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_found_by_their_files() {
        let list = "kernel/drivers/md/dm-thin-pool.ko: kernel/drivers/md/dm-bufio.ko\n\
                    updates/dkms/zfs.ko.xz: updates/dkms/spl.ko.xz\nkernel/fs/btrfs/btrfs.ko\n";
        for there in ["dm_thin_pool", "zfs", "btrfs"] {
            assert!(has_module(list, there), "{there}");
        }
        for not in ["spl", "dm_bufio", "thin_pool", "xfs", ""] {
            assert!(!has_module(list, not), "{not}");
        }
    }

    #[test]
    fn versions_are_the_first_number() {
        let lvm = "  LVM version:     2.03.16(2) (2022-05-18)\n  Library version: 1.02.185 (2022-05-18)\n";
        assert_eq!(number(lvm), "2.03.16");
        assert_eq!(number("mkfs.btrfs, part of btrfs-progs v6.2\n"), "6.2");
        assert_eq!(number("nothing 7"), "");
    }

    #[tokio::test]
    async fn what_is_missing_is_named() {
        let policy = HostPolicy { trial_pools: PoolKind::ALL.to_vec(), ..HostPolicy::default() };
        let of_default = all(&HostPolicy::default()).await;
        for kind in [PoolKind::Zfs, PoolKind::Lvm] {
            assert!(of_default.iter().any(|d| d.kind == kind && d.missing.is_some()), "{kind:?} is on trial");
        }
        let all = all(&policy).await;
        assert_eq!(all.iter().map(|d| d.kind).collect::<Vec<_>>(), PoolKind::ALL);
        assert_eq!(all[0].missing, None, "directories are everywhere");
        for driver in all.iter().filter(|d| d.missing.is_some()) {
            let e = ready(driver.kind).await.unwrap_err();
            let named = ["install", "kernel"].iter().any(|word| e.message.contains(word));
            assert!(e.is(karst_model::ErrorKind::Unsupported) && named, "{e}");
        }
    }
}
