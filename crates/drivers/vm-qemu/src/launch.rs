//! Everything QEMU needs, made ready: files and sockets opened by root and handed on as descriptors, taps, control
//! groups, the keeper's specification. Whatever is made here vanishes with its descriptor or is removed by the caller.

use crate::{
    argv::{Machine, argv, fd},
    devices::{Disk, Layout, MAX_LOWER, Nic},
    directories, given, keys,
    placement::Placed,
    ports,
    probe::kvm_group,
    record::{Record, first_balloon},
    seed, share, threads,
};
use karst_guest::{
    DiskFormat, LowerFile, Opened, ResolvedDisk, ResolvedGuest, ResolvedLink, ResolvedNic,
    keeper::{Console, Spec},
};
use karst_host::{
    Program,
    cgroup::{CgroupLimits, Cgroups},
    link, tap,
};
use karst_model::{
    Error, ErrorKind, InstanceId, Result,
    device::ParentLink,
    instance::Firmware,
    node::AcceleratorKind,
    spec::{CpuAllowance, CpuLimit, SwapLimit},
};
use rustix::fs::{FileType, MemfdFlags, Mode, OFlags, SealFlags};
use std::{
    ffi::OsString,
    fs::File,
    io::Write,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::Path,
    time::Duration,
};
use tokio::net::UnixStream;

/// The sockets in a guest's state directory; root's alone (0600), QEMU only inherits them.
pub(crate) const QMP: &str = "qmp.sock";
pub(crate) const EVENTS: &str = "events.sock";
pub(crate) const AGENT: &str = "agent.sock";
pub(crate) const LINK: &str = "karst-agent.sock";
/// That at which a backup is read; QEMU gets it when one begins.
pub(crate) const BACKUP: &str = "backup.sock";
/// Variables of the two kinds of UEFI firmware: those without enrolled keys are of no use under secure boot, nor the others
/// without it.
fn nvram_file(firmware: Firmware) -> &'static str {
    if firmware == Firmware::UefiSecure { "nvram.secure.fd" } else { "nvram.fd" }
}

/// Each file of the console log.
const CONSOLE_LOG: u64 = 256 * 1024;

/// The control groups of a guest, named as a container's.
#[derive(Debug, Clone)]
pub(crate) struct Groups {
    /// QEMU, with its limits.
    pub(crate) machine: String,
    /// The keeper.
    pub(crate) keeper: String,
}

impl Groups {
    pub(crate) fn of(daemon_id: &str, instance: InstanceId) -> Self {
        Self {
            machine: format!("karst-{daemon_id}/{instance}"),
            keeper: format!("karst-{daemon_id}/{instance}.keeper"),
        }
    }

    /// Removes them, ending whatever is still inside; fine when they are not there.
    pub(crate) async fn remove(&self, cgroups: &Cgroups) -> Result<()> {
        if cgroups.exists(&self.machine) {
            cgroups.kill(&self.machine).await?;
        }
        cgroups.remove(&self.machine).await?;
        cgroups.remove(&self.keeper).await
    }
}

/// Limits of QEMU's process. Memory is the guest's size and needs no second limit, which could only kill it; who wants one all the
/// same gives it room beside.
///
/// # Errors
/// Invalid for a NUMA node that this host does not have.
pub(crate) fn limits(guest: &ResolvedGuest, placed: &Placed) -> Result<CgroupLimits> {
    let cpu_nodes = guest.limits.cpu_nodes.as_ref().or(placed.cpu.as_ref());
    Ok(CgroupLimits {
        cpus: match (&guest.limits.cpu, cpu_nodes) {
            (Some(CpuLimit::Set { cpus }), _) => Some(cpus.clone()),
            (_, Some(nodes)) => Some(karst_host::numa::cpus_of(nodes)?),
            _ => None,
        },
        cpu_quota: match guest.limits.cpu_allowance {
            Some(CpuAllowance::Quota { quota_us, period_us }) => Some((quota_us, period_us)),
            _ => None,
        },
        cpu_share: match guest.limits.cpu_allowance {
            Some(CpuAllowance::Share { percent }) => Some(percent),
            _ => None,
        },
        cpu_shares: guest.limits.cpu_shares,
        nodes: placed.limit(guest),
        memory: guest.limits.memory_hard.map(|m| m.bytes()),
        memory_high: guest.limits.memory_high.map(|m| m.bytes()),
        swap: match guest.limits.swap {
            None | Some(SwapLimit::Allowed) => None,
            Some(SwapLimit::Forbidden) => Some(0),
            Some(SwapLimit::Bytes { bytes }) => Some(bytes),
        },
        io_weight: guest.limits.disk_priority.map(|p| (p.min(10) * 100).max(10)),
        ..CgroupLimits::default()
    })
}

fn open_dir(dir: &Path) -> std::io::Result<OwnedFd> {
    Ok(rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// How long who connects waits for a place among those who wait, and how long between two tries.
const PLACE: Duration = Duration::from_secs(5);
const TRY: Duration = Duration::from_millis(5);

/// Connects to a socket of `dir`, through a descriptor because a socket's path may have 107 bytes only.
///
/// QEMU listens for one at a time: two more wait in the kernel, and who comes then is not let wait there but refused
/// (`EAGAIN`). He waits here.
pub(crate) async fn connect(dir: &Path, name: &str) -> std::io::Result<UnixStream> {
    let dir = open_dir(dir)?;
    let path = format!("/proc/self/fd/{}/{name}", dir.as_raw_fd());
    let end = tokio::time::Instant::now() + PLACE;
    loop {
        match UnixStream::connect(&path).await {
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock && tokio::time::Instant::now() < end => {
                tokio::time::sleep(TRY).await;
            }
            connected => return connected,
        }
    }
}

pub(crate) fn listen(dir: &Path, name: &str) -> Result<OwnedFd> {
    let dir = open_dir(dir)?;
    let path = format!("/proc/self/fd/{}/{name}", dir.as_raw_fd());
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
        _ => {}
    }
    let listener = std::os::unix::net::UnixListener::bind(&path)?;
    // Nobody else can be quicker: the directory is root's, and 0600 needs no more than write permission to connect.
    rustix::fs::chmod(&path, Mode::from_raw_mode(0o600)).map_err(std::io::Error::from)?;
    Ok(listener.into())
}

/// A socket that listens for one connection, and that connection: nobody else finds the one or makes the other.
pub(crate) fn paired(dir: &Path, name: &str) -> Result<(OwnedFd, OwnedFd)> {
    let listener = listen(dir, name)?;
    let dir = open_dir(dir)?;
    let path = format!("/proc/self/fd/{}/{name}", dir.as_raw_fd());
    let connected = std::os::unix::net::UnixStream::connect(&path)?;
    std::fs::remove_file(&path)?;
    Ok((listener, connected.into()))
}

/// Descriptors of a disk: its own, and of the file below a clone; and whether it is a block device.
pub(crate) fn open_disk(disk: &ResolvedDisk) -> Result<(OwnedFd, Option<OwnedFd>, bool)> {
    let field = format!("devices.{}", disk.name);
    if disk.format == DiskFormat::Directory {
        return Err(Error::invalid(field, "a disk of a virtual machine is a disk image, not a directory"));
    }
    let write = !(disk.readonly || disk.cdrom);
    let (file, block) = match &disk.opened {
        Some(opened) => granted(opened, write).map_err(|e| match e.raw_os_error() {
            Some(libc::EBUSY) => {
                let text =
                    format!("{:?} is in use on the host: mounted, or part of something else", disk.path);
                Error::conflict(text).at(format!("{field}.source"))
            }
            _ => e.into(),
        })?,
        None => {
            let meta = std::fs::symlink_metadata(&disk.path).map_err(|e| match e.kind() {
                std::io::ErrorKind::NotFound => Error::not_found(format!(
                    "the disk {:?} of the virtual machine does not exist",
                    disk.name
                )),
                _ => e.into(),
            })?;
            let block = meta.file_type().is_block_device();
            let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | if block { libc::O_DIRECT } else { 0 };
            (File::options().read(true).write(write).custom_flags(flags).open(&disk.path)?, block)
        }
    };
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&file).map_err(std::io::Error::from)?.st_mode);
    if !matches!(kind, FileType::RegularFile | FileType::BlockDevice) {
        return Err(Error::invalid(field, "a disk of a virtual machine is a disk image or a block device"));
    }
    let base = match &disk.backing {
        Some(base) => Some(File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(base)?.into()),
        None => None,
    };
    Ok((file.into(), base, block))
}

/// Descriptors of the files below that of a disk in layers, the next one first. They can be written: a merge does.
pub(crate) fn open_lower(disk: &ResolvedDisk) -> Result<Vec<OwnedFd>> {
    // A job that puts layers together writes to those below; of a disk that is only read there is none.
    let write = !(disk.readonly || disk.cdrom);
    let open = |lower: &LowerFile| -> Result<OwnedFd> {
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = File::options().read(true).write(write).custom_flags(flags).open(&lower.path)?;
        if !file.metadata()?.is_file() {
            let text = "what lies below a layer of a disk is a file";
            return Err(Error::invalid(format!("devices.{}", disk.name), text));
        }
        Ok(file.into())
    };
    disk.chain.below.iter().map(open).collect()
}

/// Opens a path of the host that was found beneath what the host grants: what was found, whatever its name leads to by now. A block
/// device that is written is nobody else's meanwhile; the kernel refuses one that is mounted.
fn granted(found: &Opened, write: bool) -> std::io::Result<(File, bool)> {
    let stat = rustix::fs::fstat(&*found.0)?;
    let block = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
    let alone = if write { libc::O_EXCL } else { 0 };
    let flags = libc::O_NONBLOCK | if block { libc::O_DIRECT | alone } else { 0 };
    let name = format!("/proc/self/fd/{}", found.0.as_raw_fd());
    Ok((File::options().read(true).write(write).custom_flags(flags).open(name)?, block))
}

/// The host's side of a NIC: a tap in a bridge, or a macvtap, which the caller deletes at the end.
pub(crate) fn open_tap(dir: &Path, nic: &ResolvedNic) -> Result<OwnedFd> {
    let field = |key: &str| format!("devices.{}.{key}", nic.name);
    let tap = match &nic.link {
        ResolvedLink::Bridge(bridge) => {
            tap::open(&tap::TapSpec { name: &nic.host_interface, bridge, guest_mac: &nic.mac, mtu: nic.mtu })?
        }
        ResolvedLink::Macvlan(ParentLink { parent, vlan, mode }) => {
            let name = vlan.map_or_else(|| parent.clone(), |v| format!("{parent}.{v}"));
            let found = link::get(&name)?.ok_or_else(|| {
                Error::not_found(format!("this host has no interface {name:?}")).at(field("parent"))
            })?;
            drop_link(nic)?;
            karst_host::nic::create_macvtap(&found, *mode, &nic.host_interface, &nic.mac, nic.mtu)
                .map_err(|e| e.at(field("parent")))?;
            let opened = link::set_up(&nic.host_interface, true)
                .and_then(|()| tap::open_macvtap(&nic.host_interface, dir));
            if opened.is_err() {
                drop_link(nic)?;
            }
            opened?
        }
        _ => {
            return Err(Error::unsupported("a virtual machine has NICs on bridges and macvlan only")
                .at(field("nictype")));
        }
    };
    if let Some(other) = &nic.host_name {
        karst_host::nic::add_name(&nic.host_interface, other).map_err(|e| e.at(field("host_name")))?;
    }
    if let Some(packets) = nic.queue_length {
        karst_host::nic::set_queue_length(&nic.host_interface, packets)?;
    }
    if let (Some(vlan), Some(_)) = (nic.vlans.untagged, nic.bridge()) {
        karst_host::nic::add_port_vlan(&nic.host_interface, vlan, true).map_err(|e| e.at(field("vlan")))?;
    }
    if let Some(bridge) = nic.bridge().filter(|_| nic.vlans.untagged.is_some() || nic.vlans.closed) {
        karst_host::nic::leave_default_vlan(&nic.host_interface, bridge, nic.vlans.untagged)
            .map_err(|e| e.at(field("vlan")))?;
    }
    for vlan in nic.vlans.tagged.iter().filter(|v| nic.vlans.untagged != Some(**v)) {
        karst_host::nic::add_port_vlan(&nic.host_interface, *vlan, false)
            .map_err(|e| e.at(field("vlan.tagged")))?;
    }
    Ok(tap)
}

/// Deletes what stays on the host when the descriptor is closed; fine when it is not there.
pub(crate) fn drop_link(nic: &ResolvedNic) -> Result<()> {
    match &nic.link {
        ResolvedLink::Macvlan(_) => match link::delete(&nic.host_interface) {
            Err(e) if !e.is(ErrorKind::NotFound) => Err(e),
            _ => Ok(()),
        },
        _ => Ok(()),
    }
}

/// The same for all NICs of a machine that has ended.
pub(crate) fn drop_links(record: &Record) -> Result<()> {
    let mut outcome = Ok(());
    for nic in record.devices.iter().flat_map(|d| &d.nics) {
        outcome = outcome.and(drop_link(nic));
    }
    outcome
}

/// A sealed, read-only descriptor without a file: what users say to their guests is in none.
pub(crate) fn sealed(name: &str, content: &[u8]) -> Result<OwnedFd> {
    let memory = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map_err(std::io::Error::from)?;
    let mut file = File::from(memory);
    file.write_all(content)?;
    rustix::fs::fcntl_add_seals(
        &file,
        SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL,
    )
    .map_err(std::io::Error::from)?;
    // QEMU takes a read-only node only from a read-only descriptor.
    Ok(File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?.into())
}

/// Code and template of the variables, of Debian's package `ovmf`.
fn firmware(firmware: Firmware) -> Option<(&'static str, &'static str)> {
    match firmware {
        Firmware::Bios => None,
        Firmware::Uefi => Some(("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd")),
        Firmware::UefiSecure => {
            Some(("/usr/share/OVMF/OVMF_CODE_4M.secboot.fd", "/usr/share/OVMF/OVMF_VARS_4M.ms.fd"))
        }
    }
}

/// The guest's own variables, made of the template at the first start.
fn nvram(dir: &Path, name: &str, template: &str) -> Result<OwnedFd> {
    let path = dir.join(name);
    let open = || File::options().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(&path);
    match open() {
        Ok(f) => Ok(f.into()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let content = std::fs::read(template).map_err(|e| {
                Error::unsupported("UEFI needs the package ovmf on this host").with_context(e)
            })?;
            let temporary = dir.join("nvram.new");
            let mut file =
                File::options().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            file.write_all(&content)?;
            file.sync_all()?;
            std::fs::rename(&temporary, &path)?;
            Ok(open()?.into())
        }
        Err(e) => Err(e.into()),
    }
}

/// Removes what a firmware keeps; fine when there is nothing.
fn forget(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

/// Must something be said to QEMU before the guest's first instruction?
pub(crate) fn hold(guest: &ResolvedGuest) -> bool {
    guest.nics.iter().any(|n| n.disconnected)
        || !guest.limits.pins.is_empty()
        || first_balloon(guest).is_some()
        || guest.machine.as_ref().is_some_and(|m| m.resume || m.paused)
}

/// Makes everything; the control groups are the caller's to remove when anything fails.
pub(crate) fn prepare(
    guest: &ResolvedGuest,
    record: &Record,
    groups: &Groups,
    cgroups: &Cgroups,
) -> Result<(Spec, Vec<OwnedFd>)> {
    let mut spec = guest
        .machine
        .clone()
        .ok_or_else(|| Error::invalid("hardware", "a virtual machine needs its hardware described"))?;
    given::retain(&mut spec.given, guest);
    if guest.ids.base == 0 {
        return Err(Error::internal("the guest could not be started", "QEMU would run as root"));
    }
    spec.board = record.placed.spread(spec.board);
    let code = firmware(spec.firmware);
    let layout = Layout::of(&spec.machine, spec.ports)?;
    let (mut fds, mut disks) = (vec![], vec![]);
    let mut lower = fd::LAYER;
    let memory = spec.board.memory.unwrap_or_default();
    let render = spec.board.render.clone();
    if memory.disk {
        fds.push((fd::MEMORY, place_of_memory(&guest.state_dir, guest.ids.base)?));
    }
    for (i, disk) in directories::drives(guest).enumerate() {
        let number = fd::DISK + 2 * i as i32;
        let mut block_device = false;
        if !disk.ejected {
            let (file, base, block) = open_disk(disk)?;
            block_device = block;
            fds.push((number, file));
            fds.extend(base.map(|b| (number + 1, b)));
            fds.extend(keys::descriptor(disk)?.map(|key| (fd::KEY + i as i32, key)));
            for file in open_lower(disk)? {
                fds.push((lower, file));
                lower += 1;
            }
        }
        disks.push(Disk::new(disk, block_device, layout.hotplug()));
    }
    if lower - fd::LAYER > MAX_LOWER as i32 {
        return Err(Error::conflict(format!(
            "the disks of the virtual machine have more than {MAX_LOWER} layers in all below the active ones; that many cannot be opened"
        )));
    }
    let mut shared = vec![];
    let opened = directories::open(guest, &record.directories, &record.virtiofs)?;
    for (i, (directory, (file, way))) in record.directories.iter().zip(opened).enumerate() {
        // The connection to who serves one comes when that runs.
        fds.extend(file.map(|file| (fd::DIRECTORY + i as i32, file)));
        shared.push((directory.clone(), way));
    }
    let medium = share::read(&guest.state_dir)?;
    fds.push((fd::SHARE, medium.directory));
    let image = seed::seed(&guest.cloud_init, &guest.hostname, &medium.files)?;
    fds.push((fd::SEED, sealed("cidata", &image)?));
    for (i, string) in spec.strings.iter().enumerate() {
        fds.push((fd::STRINGS + i as i32, sealed("smbios", string.as_bytes())?));
    }
    match (&spec.kernel, &guest.kernel) {
        (None, _) => {}
        (Some(wanted), Some(kernel)) if wanted.initrd.is_some() == kernel.initrd.is_some() => {
            fds.push((fd::KERNEL, kernel.kernel.0.try_clone()?));
            if let Some(initrd) = &kernel.initrd {
                fds.push((fd::INITRD, initrd.0.try_clone()?));
            }
        }
        (Some(wanted), _) => {
            return Err(Error::internal("the kernel of the guest was not opened", &wanted.name));
        }
    }
    fds.extend(ports::descriptors(guest, &spec.lines)?);
    fds.extend(given::descriptors(guest, &spec.given)?);
    if let Some((_, template)) = code {
        let name = nvram_file(spec.firmware);
        // What was there when memory was saved belongs to it.
        if spec.fresh_firmware && !spec.resume {
            forget(&guest.state_dir.join(name))?;
        }
        fds.push((fd::VARS, nvram(&guest.state_dir, name, template)?));
    }
    let machine = Machine {
        name: guest.instance.to_string(),
        spec,
        accelerator: guest.accelerator,
        cpus: record.cpus,
        max_cpus: record.max_cpus,
        memory: record.memory,
        disks,
        directories: shared,
        nics: guest.nics.iter().map(Nic::new).collect(),
        seed: true,
        firmware_code: code.map(|(code, _)| code.to_owned()),
        hold: hold(guest),
        spice: record.spice,
        own_cid: karst_model::device::own_cid(guest.domain_id),
    };
    let program = Program::QemuSystemX86.path()?;
    let mut arguments = vec!["qemu-system-x86_64".into()];
    arguments.extend(argv(&machine)?.into_iter().map(Into::into));

    fds.push((fd::QMP, listen(&guest.state_dir, QMP)?));
    fds.push((fd::EVENTS, listen(&guest.state_dir, EVENTS)?));
    fds.push((fd::AGENT, listen(&guest.state_dir, AGENT)?));
    fds.push((fd::LINK, listen(&guest.state_dir, LINK)?));
    for (i, n) in guest.nics.iter().enumerate().filter(|(_, n)| n.link != ResolvedLink::User {}) {
        fds.push((fd::NIC + i as i32, open_tap(&guest.state_dir, n)?));
    }
    let limits = limits(guest, &record.placed)?;
    cgroups.create(&groups.machine)?;
    cgroups.limit(&groups.machine, &limits)?;
    threads::demand(&guest.limits.pins, &threads::cpus(&limits, cgroups, &groups.machine))?;
    cgroups.create(&groups.keeper)?;

    let kvm = (guest.accelerator == AcceleratorKind::Kvm).then(kvm_group).flatten();
    // The host has granted it; QEMU opens it by its name.
    let card = render.as_deref().map(std::fs::metadata).transpose()?.map(|found| found.gid());
    // A node that no rule of udev has given a group is root's: that group would open much else.
    let card = card.filter(|group| *group != 0);
    let (numbers, fds) = fds.into_iter().unzip();
    let spec = Spec {
        daemon: guest.daemon_id.clone(),
        instance: guest.instance.to_string(),
        generation: (guest.generation.incarnation, guest.generation.n),
        program,
        argv: arguments,
        env: environment(guest)?,
        user: Some((guest.ids.base, guest.ids.base, kvm.into_iter().chain(card).collect())),
        no_new_privs: true,
        clear_capabilities: true,
        keeper_cgroups: cgroups.dirs(&groups.keeper),
        cgroups: cgroups.dirs(&groups.machine),
        rlimits: process_limits(memory.locked),
        fds: numbers,
        console: Console::Socket(fd::CONSOLE),
        log_size: CONSOLE_LOG,
        ..Spec::default()
    };
    Ok((spec, fds))
}

/// Limits of QEMU's process. No core dump: it would hold the guest's memory.
fn process_limits(locked: bool) -> Vec<(u32, u64, u64)> {
    let mut all = vec![(libc::RLIMIT_CORE, 0, 0), (libc::RLIMIT_NOFILE, 16384, 16384)];
    if locked {
        all.push((libc::RLIMIT_MEMLOCK, libc::RLIM_INFINITY, libc::RLIM_INFINITY));
    }
    all
}

/// A directory that QEMU's user alone makes files in: those of its memory, which lose their names as soon as they are made. What one left
/// that was killed in between goes.
fn place_of_memory(dir: &Path, id: u32) -> Result<OwnedFd> {
    let place = dir.join("memory");
    match std::fs::create_dir(&place) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(e.into()),
        _ => {}
    }
    for entry in std::fs::read_dir(&place)? {
        std::fs::remove_file(entry?.path())?;
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = rustix::fs::open(&place, flags, Mode::empty()).map_err(std::io::Error::from)?;
    rustix::fs::fchmod(&opened, Mode::from_raw_mode(0o700)).map_err(std::io::Error::from)?;
    let (user, group) = (rustix::process::Uid::from_raw(id), rustix::process::Gid::from_raw(id));
    rustix::fs::fchown(&opened, Some(user), Some(group)).map_err(std::io::Error::from)?;
    Ok(opened)
}

/// What QEMU is told by its environment: the time zone of the clock of its hardware too.
fn environment(guest: &ResolvedGuest) -> Result<Vec<(OsString, OsString)>> {
    let mut all = vec![("PATH".into(), "/usr/bin:/bin".into()), ("LC_ALL".into(), "C.UTF-8".into())];
    if let Some(zone) = guest.machine.as_ref().and_then(|m| m.board.clock_zone.as_deref()) {
        // Of one that is not there QEMU would make UTC.
        if !Path::new("/usr/share/zoneinfo").join(zone).is_file() {
            let text = format!("{zone:?} is no time zone of this host (the package tzdata)");
            return Err(Error::invalid("config.hardware.clock.zone", text));
        }
        all.push(("TZ".into(), zone.into()));
    }
    Ok(all)
}

/// Removes the sockets of a guest that has ended.
pub(crate) fn remove_sockets(dir: &Path) {
    for name in [QMP, EVENTS, AGENT, LINK, BACKUP] {
        let _ = std::fs::remove_file(dir.join(name));
    }
    ports::remove_sockets(dir);
}

/// What QEMU's last words mean, for a user.
pub(crate) fn explain(output: &str, record: &Record) -> Error {
    let line = output
        .lines()
        .rev()
        .map(|l| l.split_once("qemu-system-x86_64: ").map_or(l, |(_, rest)| rest))
        .map(|l| crate::line::printable(l, 400))
        .find(|l| !l.is_empty())
        .unwrap_or_else(|| "it wrote no reason".to_owned());
    if let Some(e) = keys::explain(output, keys::told_of(output, record)) {
        let text = format!("the virtual machine could not be started: {}", e.message);
        return Error { message: text, ..e }.with_context(output.trim());
    }
    let (kind, text) = if output.contains("Failed to get \"write\" lock")
        || output.contains("Failed to get shared \"write\" lock")
    {
        (ErrorKind::Conflict, "its disk image is in use by another program".to_owned())
    } else if output.contains("Cannot allocate memory") || output.contains("cannot set up guest memory") {
        (
            ErrorKind::Quota,
            format!("this host cannot give it {} MiB of memory; lower limits.memory", record.memory >> 20),
        )
    } else if output.contains("unsupported machine type") {
        (
            ErrorKind::Unsupported,
            "QEMU of this host does not have its machine type; install a newer QEMU".to_owned(),
        )
    } else if output.contains("Could not access KVM kernel module")
        || output.contains("failed to initialize kvm")
    {
        (ErrorKind::Unavailable, "KVM is not usable by it; check the group and mode of /dev/kvm".to_owned())
    } else if output.contains("spice support is disabled")
        || output.contains("failed to initialize spice server")
    {
        (
            ErrorKind::Unsupported,
            "SPICE of this host's QEMU does not work; install the package qemu-system-modules-spice of QEMU's own version, or \
             unset hardware.spice"
                .to_owned(),
        )
    } else if output.contains("TPM result for CMD_INIT") {
        (
            ErrorKind::Invalid,
            "the state of its TPM cannot be read; was it encrypted with another passphrase than its secret has now, or not at all?"
                .to_owned(),
        )
    } else if output.contains("is not in qcow2 format") {
        (ErrorKind::Invalid, "its disk image is not the qcow2 image that it should be".to_owned())
    } else {
        (ErrorKind::Internal, line)
    };
    Error::new(kind, format!("the virtual machine could not be started: {text}")).with_context(output.trim())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::Read, sync::Arc};

    #[test]
    fn a_connection_is_made_before_anybody_serves_it() {
        let dir = tempfile::tempdir().unwrap();
        let (listener, connected) = paired(dir.path(), "one").unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nobody else can connect");
        let mut ours = std::os::unix::net::UnixStream::from(connected);
        ours.write_all(b"first").unwrap();
        let (mut theirs, _) = std::os::unix::net::UnixListener::from(listener).accept().unwrap();
        drop(ours);
        let mut text = String::new();
        theirs.read_to_string(&mut text).unwrap();
        assert_eq!(text, "first");
    }

    #[tokio::test]
    async fn many_at_once_wait_for_a_place() {
        let dir = tempfile::tempdir().unwrap();
        let listener = listen(dir.path(), "s").unwrap();
        // As QEMU listens with a descriptor that it was handed.
        rustix::net::listen(&listener, 1).unwrap();
        let path = dir.path().to_owned();
        let mut all = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let path = path.clone();
            all.spawn(async move { connect(&path, "s").await });
        }
        let served = tokio::task::spawn_blocking(move || {
            let listener = std::os::unix::net::UnixListener::from(listener);
            let mut served = vec![];
            for _ in 0..8 {
                std::thread::sleep(Duration::from_millis(10));
                served.push(listener.accept().unwrap().0);
            }
            served
        });
        while let Some(connected) = all.join_next().await {
            connected.unwrap().expect("a place");
        }
        assert_eq!(served.await.unwrap().len(), 8);

        let nobody = connect(dir.path(), "t").await.unwrap_err();
        assert_eq!(nobody.kind(), std::io::ErrorKind::NotFound, "who is not there is not waited for");
    }

    #[test]
    fn what_a_firmware_keeps_is_there_until_it_is_to_be_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let template = dir.path().join("template");
        std::fs::write(&template, "fresh").unwrap();
        let (path, template) = (dir.path().join("nvram.fd"), template.to_str().unwrap());
        forget(&path).unwrap();
        drop(nvram(dir.path(), "nvram.fd", template).unwrap());
        std::fs::write(&path, "kept").unwrap();
        drop(nvram(dir.path(), "nvram.fd", template).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "kept");
        forget(&path).unwrap();
        drop(nvram(dir.path(), "nvram.fd", template).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "fresh");
    }

    #[test]
    fn what_lies_below_a_disk_that_is_only_read_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer-1.img");
        std::fs::write(&path, "kept").unwrap();
        let below = vec![LowerFile { number: 1, path: path.clone(), format: DiskFormat::Raw }];
        let disk = ResolvedDisk {
            chain: karst_guest::DiskChain { number: 2, below },
            ..karst_guest::samples::disk("data", "scsi1", dir.path().join("disk.img"), DiskFormat::Qcow2)
        };
        let written = |disk: &ResolvedDisk| {
            let fd = open_lower(disk).unwrap().remove(0);
            rustix::io::write(&fd, b"K").is_ok()
        };
        assert!(!written(&ResolvedDisk { readonly: true, ..disk.clone() }));
        assert!(!written(&ResolvedDisk { cdrom: true, ..disk.clone() }));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "kept");
        assert!(written(&ResolvedDisk { readonly: false, cdrom: false, ..disk }), "a merge writes to it");
    }

    #[test]
    fn a_path_of_the_host_is_what_was_found_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        std::fs::write(&path, "found").unwrap();
        let found = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let disk = ResolvedDisk {
            readonly: true,
            foreign: true,
            opened: Some(Opened(Arc::new(found))),
            ..karst_guest::samples::disk("data", "scsi1", path.clone(), DiskFormat::Raw)
        };
        // Somebody puts something else in its place.
        std::fs::rename(&path, dir.path().join("old")).unwrap();
        std::os::unix::fs::symlink("/etc/shadow", &path).unwrap();
        let (fd, base, block) = open_disk(&disk).unwrap();
        let mut text = String::new();
        File::from(fd).read_to_string(&mut text).unwrap();
        assert_eq!((text.as_str(), base.is_none(), block), ("found", true, false));
        // By its name it would be that.
        assert!(open_disk(&ResolvedDisk { opened: None, ..disk }).is_err());
    }
}
