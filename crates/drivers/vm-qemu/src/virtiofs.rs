//! Directories that a machine shares by virtiofs: for each a process `virtiofsd` beside QEMU, under a keeper of its own.
//!
//! It is root of a user namespace whose ids are the guest's range, and nobody on the host: what the guest says of owners becomes
//! true of the files, within that range. The directory is attached in a mount namespace that is its own alone, because virtiofsd
//! takes a directory by its name; from there virtiofsd goes on into namespaces in which there is nothing else. Its one connection
//! is QEMU's, made before either runs. With QEMU's end of it virtiofsd ends; when it ends before, the guest waits for answers that
//! do not come, until it is started anew.
//!
//! Why it is as it is: ADR 0065. Its options are those of virtiofsd 1.10 (Ubuntu 24.04) to 1.13 (Debian 13).

use crate::{
    argv::fd,
    board,
    directories::{self, Directory},
    launch::{self, Groups},
    machine::Inner,
    owners,
    record::Record,
};
use karst_guest::{
    ResolvedGuest,
    keeper::{self, End, Exit, Keeper, Spec, State},
};
use karst_host::{Program, cgroup::Cgroups, mountns};
use karst_model::{
    Error, Result,
    device::{DiskBus, DiskLimits, ShareCache, ShareOptions},
    instance::RuntimeState,
};
use std::{
    collections::BTreeSet,
    io::ErrorKind,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, Weak},
    time::{Duration, SystemTime},
};

/// Below the guest's directory: a directory for each keeper, named by the slot.
const DIR: &str = "virtiofs";
/// The socket, as long as it has a name.
const SOCKET: &str = "socket";
/// The descriptor of the listening socket in its process.
const LISTENER: i32 = 10;
/// Where the directory is attached, in its own namespace: one that hosts have, and that is everybody's to reach.
static PLACES: [&str; 4] = ["/mnt", "/media", "/srv", "/tmp"];
/// The oldest that has the options.
const OLDEST: (u32, u32) = (1, 10);
/// How long it may take to tell its version.
const VERSION: Duration = Duration::from_secs(10);
/// How long it may take to see that QEMU is gone.
const LAST: Duration = Duration::from_secs(3);
/// Within that time its machine has ended as well, where it ended with it.
const TOGETHER: Duration = Duration::from_secs(10);
/// Files and directories that it has open at a time, one for each that the guest's kernel remembers.
const OPEN_FILES: u64 = 1_000_000;

type Cached = Option<(PathBuf, SystemTime, String)>;
static CACHE: Mutex<Cached> = Mutex::new(None);

/// `virtiofsd 1.13.2`. The one that came with QEMU 7.2 says it in other words.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.strip_prefix("virtiofsd ")?.trim().split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Has this host a virtiofsd that can be used? Its answer is kept until the program changes.
///
/// # Errors
/// Unsupported, naming the package.
pub async fn demand_program() -> Result<()> {
    let path = Program::Virtiofsd.path()?;
    let modified = std::fs::metadata(&path)?.modified()?;
    let hit = CACHE.lock().ok().and_then(|c| c.clone()).filter(|(p, m, _)| *p == path && *m == modified);
    let said = match hit {
        Some((.., said)) => said,
        None => {
            let out = karst_host::run(Program::Virtiofsd).arg("--version").timeout(VERSION).output().await?;
            let said = crate::line::printable(&String::from_utf8_lossy(&out.stdout), 100);
            if let Ok(mut cache) = CACHE.lock() {
                *cache = Some((path, modified, said.clone()));
            }
            said
        }
    };
    match version(&said) {
        Some(found) if found >= OLDEST => Ok(()),
        _ => Err(Error::unsupported(format!(
            "the virtiofsd of this host ({said:?}) is not the one that is needed; install the package virtiofsd, {}.{} or later",
            OLDEST.0, OLDEST.1
        ))),
    }
}

/// What of a directory itself, or of the machine, is against sharing it so. Reads in a volume, a bounded time.
async fn demand_fit(guest: &ResolvedGuest, directory: &Directory) -> Result<()> {
    if directory.limits != DiskLimits::default() {
        return Err(Error::unsupported(
            "virtiofs has no limits of rates; unset limits.read, limits.write and limits.max",
        ));
    }
    if let Some(key) = guest.machine.as_ref().and_then(|m| board::private(&m.board)) {
        return Err(Error::unsupported(format!(
            "virtiofs needs all of the machine's memory shared, and {key} says private of some"
        )));
    }
    if directory.foreign {
        return Ok(());
    }
    let volume = directories::source(guest, directory)?;
    let beside = tokio::task::spawn_blocking(move || owners::are_beside(&volume)).await;
    match beside.map_err(|e| Error::internal("the volume could not be looked at", e))?? {
        false => Ok(()),
        true => Err(Error::conflict(
            "machines that shared this volume by 9p left owners, modes and links beside its files, which virtiofs would not \
             show; set io.bus=9p, or copy the files to a new volume from inside",
        )),
    }
}

/// The slots of those directories that are shared by virtiofs: where it can be, unless 9p is asked for.
///
/// # Errors
/// Naming the device, where virtiofs is asked for and cannot be.
pub(crate) async fn choose(guest: &ResolvedGuest, directories: &[Directory]) -> Result<BTreeSet<String>> {
    let mut chosen = BTreeSet::new();
    for directory in directories.iter().filter(|d| d.bus != Some(DiskBus::Plan9)) {
        let fits = match demand_program().await {
            Ok(()) => demand_fit(guest, directory).await,
            missing => missing,
        };
        match fits {
            Ok(()) => {
                chosen.insert(directory.slot.clone());
            }
            Err(e) if directory.bus.is_some() => {
                return Err(e.at(format!("devices.{}.io.bus", directory.name)));
            }
            Err(e) => tracing::debug!(
                instance = %guest.instance, device = directory.name, error = %e, "a directory is shared by 9p"
            ),
        }
    }
    Ok(chosen)
}

/// Refuses what is asked for anew and no start could do; `served` are the slots that are shared so already.
///
/// # Errors
/// Naming the device.
pub(crate) async fn demand(
    guest: &ResolvedGuest,
    new: &[Directory],
    served: &BTreeSet<String>,
) -> Result<()> {
    let asked = |d: &&Directory| d.bus == Some(DiskBus::Virtiofs) && !served.contains(&d.slot);
    let asked: Vec<Directory> = new.iter().filter(asked).cloned().collect();
    choose(guest, &asked).await.map(drop)
}

/// Its arguments, the program's name first. All that could be its default is said.
fn argv(place: &Path, options: &ShareOptions) -> Vec<String> {
    let cache = match options.cache {
        // A second old at most, so that others who write there are seen; and files can be mapped.
        None => "auto",
        Some(ShareCache::None) => "never",
        Some(ShareCache::Always) => "always",
    };
    let mut all: Vec<String> = vec![
        "virtiofsd".into(),
        format!("--fd={LISTENER}"),
        format!("--shared-dir={}", place.display()),
        // Its own mounts, processes and network; nothing but the directory is in there.
        "--sandbox=namespace".into(),
        "--seccomp=kill".into(),
        // Handles of files would need a right over the whole file system.
        "--inode-file-handles=never".into(),
        // What is mounted below has inodes of its own.
        "--announce-submounts".into(),
        format!("--cache={cache}"),
        // As they were set.
        "--rlimit-nofile=0".into(),
        "--log-level=warn".into(),
    ];
    if !options.no_attributes {
        all.push("--xattr".into());
    }
    all.extend(options.threads.map(|n| format!("--thread-pool-size={n}")));
    all
}

fn place() -> Result<&'static Path> {
    let is_there = |place: &Path| std::fs::symlink_metadata(place).is_ok_and(|m| m.is_dir());
    PLACES.iter().map(Path::new).find(|place| is_there(place)).ok_or_else(|| {
        Error::unsupported(format!("virtiofs needs one of the directories {} on the host", PLACES.join(", ")))
    })
}

/// How much of that it may: more than this process no process is given without a right for it.
fn open_files() -> u64 {
    let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    most.unwrap_or(OPEN_FILES).min(OPEN_FILES)
}

/// What one of them is started with.
struct Ready {
    place: &'static Path,
    mounts: OwnedFd,
    ids: OwnedFd,
    listener: OwnedFd,
    /// QEMU's.
    connection: OwnedFd,
}

/// Blocks.
fn ready(guest: &ResolvedGuest, directory: &Directory, dir: &Path) -> Result<Ready> {
    for place in [dir.parent().unwrap_or(dir), dir] {
        match std::fs::DirBuilder::new().mode(0o700).create(place) {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(e.into()),
            _ => {}
        }
    }
    let ids = mountns::user_namespace(guest.ids.base, guest.ids.count)?;
    let tree = directories::tree(guest, directory, ids.as_fd())?;
    if !directory.foreign && !directory.readonly {
        owners::mark(&tree, false);
    }
    let place = place()?;
    let mounts = mountns::new_namespace(|| mountns::attach(&tree, place))?;
    let (listener, connection) = launch::paired(dir, SOCKET)?;
    Ok(Ready { place, mounts, ids, listener, connection })
}

/// Where the keeper of one is.
fn dir_of(guest_dir: &Path, slot: &str) -> PathBuf {
    guest_dir.join(DIR).join(slot)
}

/// Those of a record that are shared so, and their places among all directories.
fn served(record: &Record) -> impl Iterator<Item = (usize, &Directory)> {
    record.directories.iter().enumerate().filter(move |(_, d)| record.virtiofs.contains(&d.slot))
}

/// Starts those of a machine; answers QEMU's connections to them, by their numbers. The guest's control groups are there.
///
/// # Errors
/// Naming the device.
pub(crate) async fn start(
    guest: &ResolvedGuest,
    groups: &Groups,
    cgroups: &Cgroups,
    record: &Record,
) -> Result<Vec<(i32, OwnedFd)>> {
    // Of a QEMU that is gone.
    end(&guest.state_dir).await?;
    let mut connections = vec![];
    for (n, directory) in served(record) {
        let connection = start_one(guest, groups, cgroups, directory).await;
        let connection = connection.map_err(|e| match e.field {
            None => e.at(format!("devices.{}", directory.name)),
            Some(_) => e,
        })?;
        connections.push((fd::DIRECTORY + n as i32, connection));
    }
    Ok(connections)
}

async fn start_one(
    guest: &ResolvedGuest,
    groups: &Groups,
    cgroups: &Cgroups,
    directory: &Directory,
) -> Result<OwnedFd> {
    // Its slot is the name of a directory from here on.
    directory.id()?;
    let dir = dir_of(&guest.state_dir, &directory.slot);
    let ready = {
        let (guest, directory, dir) = (guest.clone(), directory.clone(), dir.clone());
        tokio::task::spawn_blocking(move || ready(&guest, &directory, &dir))
            .await
            .map_err(|e| Error::internal("the guest could not be started", e))??
    };
    let open_files = open_files();
    let spec = Spec {
        daemon: guest.daemon_id.clone(),
        instance: guest.instance.to_string(),
        generation: (guest.generation.incarnation, guest.generation.n),
        program: Program::Virtiofsd.path()?,
        argv: argv(ready.place, &directory.share.options).into_iter().map(Into::into).collect(),
        env: vec![("PATH".into(), "/usr/bin:/bin".into()), ("LC_ALL".into(), "C.UTF-8".into())],
        mount_namespace: true,
        user_namespace: true,
        user: Some((0, 0, vec![])),
        no_new_privs: true,
        keeper_cgroups: cgroups.dirs(&groups.keeper),
        // What it does it does for the guest, within its limits; memory that it touches first is the guest's.
        cgroups: cgroups.dirs(&groups.machine),
        rlimits: vec![(libc::RLIMIT_CORE, 0, 0), (libc::RLIMIT_NOFILE, open_files, open_files)],
        fds: vec![LISTENER],
        ..Spec::default()
    };
    keeper::launch(&dir, &spec, vec![ready.mounts, ready.ids, ready.listener]).await?;
    Ok(ready.connection)
}

/// Waits for the ends of those whose QEMU is gone, and ends what stays.
///
/// # Errors
/// When one cannot be ended.
pub(crate) async fn end(guest_dir: &Path) -> Result<()> {
    let found = match std::fs::read_dir(guest_dir.join(DIR)) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    let dirs = found.map(|entry| entry.map(|e| e.path())).collect::<std::io::Result<Vec<_>>>()?;
    // Side by side: they end with one QEMU.
    let ends = futures::future::join_all(dirs.into_iter().map(end_one)).await;
    ends.into_iter().collect()
}

async fn end_one(dir: PathBuf) -> Result<()> {
    if keeper::read_status(&dir).is_none() {
        return Ok(());
    }
    if !matches!(tokio::time::timeout(LAST, keeper::wait_gone(&dir)).await, Ok(Ok(()))) {
        keeper::end_keeper(&dir)?;
        keeper::wait_gone(&dir).await?;
    }
    Ok(())
}

/// Why a machine did not start, where that is one of them: QEMU would only say that nobody answers. Its QEMU has ended.
pub(crate) async fn explain(guest_dir: &Path, record: &Record) -> Option<Error> {
    if record.virtiofs.is_empty() {
        return None;
    }
    if let Err(e) = end(guest_dir).await {
        tracing::warn!(error = %e, context = e.context, "who shares directories of a guest could not be ended");
    }
    served(record).find_map(|(_, directory)| {
        let status = keeper::read_status(&dir_of(guest_dir, &directory.slot))?;
        let failed = match status.state {
            State::Failed => true,
            State::Exited => status.exit != Some(Exit::Code(0)),
            _ => false,
        };
        failed.then(|| {
            let said = crate::line::printable(status.output.lines().last().unwrap_or_default(), 300);
            let text = format!("the virtual machine could not be started: virtiofsd ended: {said}");
            Error::internal(text, status.output.trim()).at(format!("devices.{}", directory.name))
        })
    })
}

/// Tells when one of them ends under its machine.
pub(crate) fn watch(machine: &Arc<Inner>) {
    let record = machine.record();
    for (_, directory) in served(&record) {
        let dir = dir_of(&machine.dir, &directory.slot);
        tokio::spawn(watch_one(
            Arc::downgrade(machine),
            machine.observed.subscribe(),
            dir,
            directory.name.clone(),
        ));
    }
}

async fn watch_one(
    machine: Weak<Inner>,
    mut observed: tokio::sync::watch::Receiver<karst_guest::Observed>,
    dir: PathBuf,
    name: String,
) {
    let ended = async {
        loop {
            match Keeper::unasked(&dir).wait_exit().await {
                Ok(end) => return end,
                // Its keeper is stuck, and may be well again.
                Err(_) => tokio::time::sleep(Duration::from_secs(1)).await,
            }
        }
    };
    let end = tokio::select! {
        biased;
        // Or nobody holds the machine any more: whoever does next looks anew.
        () = stopped(&mut observed) => return,
        end = ended => end,
    };
    if tokio::time::timeout(TOGETHER, stopped(&mut observed)).await.is_ok() {
        return;
    }
    let Some(machine) = machine.upgrade() else { return };
    let instance = machine.record().instance;
    let said = match &end {
        End::Exited(status) => status.output.lines().last().unwrap_or_default(),
        End::KeeperLost(_) => "its keeper was killed",
    };
    tracing::warn!(
        %instance, device = name, reason = crate::line::printable(said, 300),
        "virtiofsd ended under its guest, which waits for the directory in vain; start the guest anew"
    );
    machine.lost.lock().unwrap_or_else(|e| e.into_inner()).insert(name);
}

async fn stopped(observed: &mut tokio::sync::watch::Receiver<karst_guest::Observed>) {
    // An error says that the machine is held no more.
    let _ = observed.wait_for(|o| o.state == RuntimeState::Stopped).await.is_ok();
}

/// What is to be known of a machine that lost some of them.
pub(crate) fn warnings(machine: &Inner) -> Vec<String> {
    let instance = machine.record().instance;
    let lost = machine.lost.lock().unwrap_or_else(|e| e.into_inner());
    let text = |name: &String| {
        format!(
            "virtiofsd of the device {name:?} of instance {instance} has ended; the guest waits for its files until it is started \
             anew"
        )
    };
    lost.iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::directories::tests::directory;
    use karst_guest::{DiskFormat, samples};
    use karst_model::{device::DiskRate, instance::InstanceKind};

    #[test]
    fn it_is_told_from_the_one_that_came_with_qemu() {
        assert_eq!(version("virtiofsd 1.13.2\n"), Some((1, 13)));
        assert_eq!(version("virtiofsd 1.10.0"), Some((1, 10)));
        assert!(version("virtiofsd 1.9.1") < Some(OLDEST) && version("virtiofsd 2.0.0") > Some(OLDEST));
        for other in [
            "virtiofsd version 7.2.18 (Debian 1:7.2+dfsg-7+deb12u15)",
            "using FUSE kernel interface version 7.36",
            "virtiofsd",
            "",
        ] {
            assert_eq!(version(other), None, "{other}");
        }
    }

    #[test]
    fn its_arguments() {
        insta::assert_snapshot!(argv(Path::new("/mnt"), &ShareOptions::default()).join("\n"), @r"
        virtiofsd
        --fd=10
        --shared-dir=/mnt
        --sandbox=namespace
        --seccomp=kill
        --inode-file-handles=never
        --announce-submounts
        --cache=auto
        --rlimit-nofile=0
        --log-level=warn
        --xattr
        ");
        let said = |text: &str| {
            let options = ShareOptions::parse("f", text, Some(DiskBus::Virtiofs)).unwrap();
            argv(Path::new("/mnt"), &options)
        };
        let all = said("cache=always,attributes=off,threads=16");
        assert!(
            all.iter().any(|a| a == "--cache=always") && all.iter().any(|a| a == "--thread-pool-size=16")
        );
        assert!(!all.iter().any(|a| a == "--xattr"), "{all:?}");
        assert!(said("cache=none").iter().any(|a| a == "--cache=never"));
        assert!(place().unwrap().is_dir());
    }

    #[tokio::test]
    async fn what_cannot_be_is_9p_unless_it_was_asked_for() {
        let root = samples::disk("root", "virtio0", "/nonexistent", DiskFormat::Raw);
        let guest = samples::guest(InstanceKind::VirtualMachine, root);
        let host = |bus: Option<DiskBus>| Directory { bus, foreign: true, ..directory("a", "fs0") };
        // Of 9p nothing is asked of the host.
        assert!(choose(&guest, &[host(Some(DiskBus::Plan9))]).await.unwrap().is_empty());
        let mut slow = host(Some(DiskBus::Virtiofs));
        slow.limits.read = Some(DiskRate::Bytes { per_second: 1 << 20 });
        let refused = choose(&guest, std::slice::from_ref(&slow)).await.unwrap_err();
        assert_eq!(refused.field.as_deref(), Some("devices.a.io.bus"));
        assert!(demand_fit(&guest, &slow).await.unwrap_err().message.contains("limits.read"));
        assert!(choose(&guest, &[Directory { bus: None, ..slow.clone() }]).await.unwrap().is_empty());
        // What is served already is not asked for anew.
        demand(&guest, std::slice::from_ref(&slow), &["fs0".to_owned()].into()).await.unwrap();
        assert!(demand(&guest, &[slow], &BTreeSet::new()).await.is_err());

        let mut apart = guest.clone();
        let mut machine = samples::machine(1);
        let keys = [("hardware.numa", "0-1:512MiB"), ("hardware.numa.memory", "0=private")];
        let keys = keys.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned()));
        machine.board = karst_model::board::Board::of(&keys.collect()).unwrap();
        apart.machine = Some(machine);
        let refused = demand_fit(&apart, &host(None)).await.unwrap_err();
        assert!(refused.message.contains("hardware.numa.memory"), "{refused}");
        demand_fit(&guest, &host(None)).await.unwrap();

        match demand_program().await {
            Ok(()) => {
                let chosen = choose(&guest, &[host(None)]).await.unwrap();
                assert_eq!(chosen.into_iter().collect::<Vec<_>>(), ["fs0"]);
            }
            Err(e) => {
                assert!(e.message.contains("install the package virtiofsd"), "{e}");
                let refused = choose(&guest, &[host(Some(DiskBus::Virtiofs))]).await.unwrap_err();
                assert!(refused.message.contains("install the package virtiofsd"), "{refused}");
                assert_eq!(refused.field.as_deref(), Some("devices.a.io.bus"));
                assert!(choose(&guest, &[host(None)]).await.unwrap().is_empty());
            }
        }
    }

    #[tokio::test]
    async fn a_volume_that_has_its_owners_beside_its_files_stays_with_9p() {
        let root = samples::disk("root", "virtio0", "/nonexistent", DiskFormat::Raw);
        let guest = samples::guest(InstanceKind::VirtualMachine, root);
        // Not in /tmp, which may be in memory and have no attributes.
        let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        let volume = Directory { source: dir.path().to_owned(), ..directory("a", "fs0") };
        let opened = directories::source(&guest, &volume).unwrap();
        if !owners::can_be_beside(&opened) {
            return crate::backends::missing("this file system keeps no attributes");
        }
        demand_fit(&guest, &volume).await.unwrap();
        owners::mark(&opened, true);
        let refused = demand_fit(&guest, &volume).await.unwrap_err();
        assert!(refused.message.contains("io.bus=9p"), "{refused}");
        assert!(choose(&guest, std::slice::from_ref(&volume)).await.unwrap().is_empty());
        // What a path of the host holds is as it is.
        demand_fit(&guest, &Directory { foreign: true, ..volume }).await.unwrap();
    }

    #[tokio::test]
    async fn nothing_that_was_never_there_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        end(dir.path()).await.unwrap();
        std::fs::create_dir_all(dir_of(dir.path(), "fs0")).unwrap();
        end(dir.path()).await.unwrap();
    }
}
