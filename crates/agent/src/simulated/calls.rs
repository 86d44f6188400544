//! The calls of the simulated host.

use super::work::*;
use super::{
    SimulatedAgent,
    state::{Guest, State},
};
use crate::{
    acl_logs::*, asks::*, backups::*, calls::*, checkpoints::*, copies::*, descriptions::*, displays::*,
    keys::*, layers::*, memory::*, neighbours::*, outputs::*, publish::*, thresholds::*,
};
use async_trait::async_trait;
use karst_model::{
    AclId, BackupId, ByteSize, Error, ImageId, InstanceId, NetworkId, PoolId, Result, SessionId, VolumeId,
    audit::{AuditEntry, AuditHead, AuditRange, AuditRecord, AuditVerdict},
    device::interface_name,
    display::DisplayProtocol,
    guest::{
        Applied, BalloonFigures, CheckpointMark, DiskBackupState, DiskCopyState, DiskFigures, MachineFigures,
        Metrics, MonitorAnswer, NicFigures, Observed, VcpuFigures,
    },
    history::{self, Meter, Series},
    image::ImageFacts,
    instance::InstanceKind,
    memory::{MemoryState, SavedMemory},
    network::Lease,
    news::Happened,
    node::{Accelerator, AcceleratorKind, HostFacts},
    pool_life::FoundSource,
    spec::{DiskSpec, GuestSpec, NetworkSpec, PoolSource, PoolSpec, VolumeSpec},
    storage::{Abilities, PoolKind, Usage},
};
use rustix::fs::{MemfdFlags, memfd_create};
use std::io::{Read, Seek, SeekFrom};
use tokio::sync::mpsc;

/// `read name(request) -> T { body }`: the body runs within [`SimulatedAgent::act`].
macro_rules! calls {
    ($( $access:ident $name:ident($me:ident, $request:ident: $ty:ty) -> $answer:ty $body:block )+) => {
        #[async_trait]
        impl HostAgent for SimulatedAgent {
            $( async fn $name(&self, context: &CallContext, $request: $ty) -> Result<$answer> {
                let $me = self;
                let work = async move $body;
                self.act(stringify!($name), calls!(@ $access), context, work).await
            } )+
            async fn events(&self) -> Result<mpsc::Receiver<AgentEvent>> { Ok(self.events.subscribe()) }
        }
    };
    (@ read) => { false };
    (@ mutate) => { true };
}

calls! {
    mutate audit_append(me, entries: Vec<AuditEntry>) -> AuditHead {
        let mut state = me.settled();
        for entry in entries {
            let record = state.audit.1.link(entry)?;
            state.audit.0.extend(record);
        }
        Ok(state.audit.1.clone())
    }
    read audit_read(me, range: AuditRange) -> Vec<AuditRecord> {
        let state = me.settled();
        let page = state.audit.0.iter().filter(|r| r.seq >= range.from);
        Ok(page.take(range.limit.min(1000) as usize).cloned().collect())
    }
    read audit_verify(me, _request: ()) -> AuditVerdict {
        let state = me.settled();
        let mut verdict = AuditVerdict { first: 1, ..Default::default() };
        for record in &state.audit.0 {
            if let Err(e) = verdict.head.follow(record) {
                verdict.fault = Some(e.message);
                break;
            }
            verdict.checked += 1;
        }
        Ok(verdict)
    }
    read host_facts(me, _request: ()) -> HostFacts {
        Ok(HostFacts {
            boot_id: format!("simulated-{}", me.boots.load(std::sync::atomic::Ordering::Relaxed)),
            hostname: me.options.name.clone(),
            architecture: "x86_64".into(),
            kernel: "6.1.0-simulated".into(),
            os_name: "Debian GNU/Linux".into(),
            os_version: "12".into(),
            accelerator: Accelerator { kind: AcceleratorKind::Kvm, reason: "simulated".into() },
            qemu: Some("7.2.0".into()),
            lxc: Some("5.0.2".into()),
            default_machine: Some("pc-q35-7.2".into()),
            spice: true,
            virtiofs: true,
            screens: me.options.screens.clone(),
            cgroup_layout: "v2".into(),
            cpus: me.options.cpus,
            memory: me.options.memory.bytes(),
            storage: super::hardware::storage(),
            warnings: vec!["this host is simulated: no guest really runs".into()],
        })
    }
    read host_resources(me, _request: ()) -> crate::resources::HostResources {
        let threads = (0..me.options.cpus).map(|n| (n, 0, true)).collect();
        let flags = crate::simulated::hardware::CPU_FLAGS.split(' ').map(str::to_owned).collect();
        let core = crate::resources::CpuCore { threads, flags, ..Default::default() };
        let socket = crate::resources::CpuSocket {
            name: "simulated".into(),
            vendor: "GenuineIntel".into(),
            cores: vec![core],
            ..Default::default()
        };
        let times = |cpu| crate::resources::CpuTimes { cpu, idle: 1_000_000_000, ..Default::default() };
        let total = me.options.memory.bytes();
        let mut cards = crate::simulated::hardware::cards();
        cards.usb.extend(me.lock().plugged.iter().cloned());
        Ok(crate::resources::HostResources {
            sockets: vec![socket],
            times: std::iter::once(None).chain((0..me.options.cpus).map(Some)).map(times).collect(),
            memory: crate::simulated::hardware::memory(total),
            processes: 1,
            ..cards
        })
    }
    read host_cpu_models(_me, _request: ()) -> Vec<crate::resources::CpuModel> {
        Ok(crate::simulated::hardware::cpu_models())
    }
    read self_check(me, _request: ()) -> SelfCheck { Ok(me.check()) }

    mutate pool_ensure(me, spec: PoolSpec) -> () {
        let mut state = me.lock();
        match state.pools.get(&spec.id) {
            Some(old) if !old.is_same_pool(&spec) => Err(Error::conflict(format!("pool {} is of another kind", spec.id))),
            _ => {
                state.closed.remove(&spec.id);
                state.pools.insert(spec.id, spec);
                Ok(())
            }
        }
    }
    mutate pool_open(me, spec: PoolSpec) -> () { me.open_pool(&spec) }
    mutate pool_close(me, pool: PoolId) -> () { me.close_pool(pool) }
    read pool_sources(me, kind: PoolKind) -> Vec<FoundSource> { me.sources(kind) }
    mutate pool_grow(me, request: PoolGrow) -> () {
        let mut state = me.lock();
        state.demand_open(request.pool)?;
        let spec = state.pools.get_mut(&request.pool).ok_or_else(|| no_pool(request.pool))?;
        match &mut spec.source {
            PoolSource::Own { size } if spec.kind != PoolKind::Dir => {
                if size.is_some_and(|now| now > request.size) {
                    return Err(Error::conflict("a pool only grows").at("config.size"));
                }
                *size = Some(request.size);
                Ok(())
            }
            _ => Err(Error::unsupported("only a pool in a file of its own has a size").at("config.size")),
        }
    }
    mutate pool_remove(me, pool: PoolId) -> () {
        let mut state = me.lock();
        if state.volumes.values().any(|v| v.spec.pool == pool) {
            return Err(Error::conflict("the pool still has volumes"));
        }
        state.pools.remove(&pool);
        state.closed.remove(&pool);
        state.described.pools.remove(&pool);
        Ok(())
    }
    mutate pool_describe(me, request: PoolDescribe) -> () { me.describe_pool(request) }
    read pool_survey(me, request: PoolSurvey) -> PoolSurveyed { me.survey_pool(&request) }
    read pools_find(me, request: PoolsFind) -> Vec<FoundPool> { me.find_pools(&request) }
    read pool_abilities(me, pool: PoolId) -> Option<Abilities> {
        let spec = {
            let state = me.lock();
            state.demand_open(pool)?;
            state.pools.get(&pool).cloned().ok_or_else(|| no_pool(pool))?
        };
        // As of a disk with ext4.
        let found = Abilities {
            owners: true,
            mapped: true,
            layers: true,
            links: true,
            holes: true,
            direct: true,
            attributes: true,
            ..Abilities::default()
        };
        Ok((spec.kind == PoolKind::Dir).then_some(found))
    }
    read pool_usage(me, pool: PoolId) -> Usage {
        let state = me.lock();
        state.demand_open(pool)?;
        let spec = state.pools.get(&pool).ok_or_else(|| no_pool(pool))?;
        let size = match spec.source {
            PoolSource::Own { size: Some(size) } => size,
            _ => me.options.pool_size,
        };
        let used = state.pool_used(pool);
        Ok(Usage { used, total: size.bytes(), inodes_used: used >> 14, inodes_total: 1 << 24 })
    }

    read pool_flush(me, pool: PoolId) -> () {
        me.lock().demand_open(pool)
    }

    read network_choose(me, wanted: NetworkChoose) -> NetworkChoice {
        interface_name("name", &wanted.name)?;
        let state = me.lock();
        let taken = |name: &str| {
            me.options.foreign_bridges.iter().any(|b| b == name) || state.networks.values().any(|n| n.spec.bridge == name)
        };
        let name = crate::names::free_name(&wanted.name, taken)?;
        let here = state.networks.values().filter_map(|n| n.spec.spec.ipv4);
        let used: Vec<_> = here.chain(wanted.taken.iter().copied()).collect();
        let free = (0..=255u8)
            .filter_map(|n| ipnet::Ipv4Net::new([10, 77, n, 1].into(), 24).ok())
            .find(|net| !used.iter().any(|u| u.contains(net) || net.contains(u)));
        let ipv4 = free.ok_or_else(|| Error::conflict("no free IPv4 subnet was found; give one as ipv4.address"))?;
        let [_, _, n, _] = ipv4.addr().octets();
        let ipv6 = ipnet::Ipv6Net::new([0xfd42, 0, 0, n.into(), 0, 0, 0, 1].into(), 64).ok();
        Ok(NetworkChoice { name, ipv4, ipv6 })
    }
    mutate network_ensure(me, spec: NetworkSpec) -> () { me.ensure_network(spec) }
    mutate network_remove(me, network: NetworkId) -> () {
        let mut state = me.settled();
        if state.guests.values().any(|g| g.runs() && g.spec.nics.iter().any(|n| n.network() == Some(network))) {
            return Err(Error::conflict("guests that run still use the network"));
        }
        state.networks.remove(&network);
        state.stopped_networks.remove(&network);
        Ok(())
    }
    mutate network_stop(me, network: NetworkId) -> () {
        let mut state = me.settled();
        if state.networks.remove(&network).is_some() {
            state.stopped_networks.insert(network);
        }
        Ok(())
    }
    read network_leases(me, network: NetworkId) -> Vec<Lease> { me.leases(network) }
    read acl_log(me, request: AclLogRead) -> Vec<u8> { me.acl_log(request) }
    mutate acl_log_remove(me, acl: AclId) -> () {
        me.settled().acl_logs_removed.insert(acl);
        Ok(())
    }
    read link_state(me, name: String) -> NetworkState { me.link_state_of(&name) }
    read neighbours(me, request: NeighboursFind) -> Vec<Neighbour> {
        request.check()?;
        let state = me.settled();
        let leases = state.networks.values().flat_map(|n| &n.leases);
        let leased = leases.map(|(mac, address)| (mac.clone(), std::net::IpAddr::from(*address)));
        let all = leased.chain(state.spoke.iter().cloned());
        let wanted = |mac: &str| request.macs.iter().any(|m| m.eq_ignore_ascii_case(mac));
        let found = all.filter(|(mac, _)| wanted(mac)).map(|(mac, address)| Neighbour { mac, address });
        Ok(found.collect())
    }
    read network_state(me, network: NetworkId) -> NetworkState { me.network(network) }

    mutate volume_create(me, spec: VolumeSpec) -> () { me.create_volume(spec) }
    mutate volume_delete(me, at: VolumeRef) -> () { me.delete_volume(at) }
    mutate volume_resize(me, request: VolumeResize) -> () { me.resize_volume(request) }
    read volume_usage(me, at: VolumeRef) -> Usage {
        let state = me.lock();
        let volume = state.volume(at)?;
        Ok(Usage {
            used: state.used(volume),
            total: volume.size.map_or(0, ByteSize::bytes),
            ..Usage::default()
        })
    }

    read volume_usages(me, all: Vec<VolumeRef>) -> Vec<(VolumeId, Usage)> {
        if all.len() > MAX_USAGES {
            return Err(Error::too_large(format!("one call tells the space of at most {MAX_USAGES} volumes")));
        }
        let state = me.lock();
        let of = |at: &VolumeRef| {
            let volume = state.volume(*at).ok()?;
            let total = volume.size.map_or(0, ByteSize::bytes);
            Some((at.volume, Usage { used: state.used(volume), total, ..Usage::default() }))
        };
        Ok(all.iter().filter_map(of).collect())
    }

    mutate volume_snapshot_create(me, at: VolumeSnapshotRef) -> () { me.create_snapshot(at) }
    mutate volume_snapshot_delete(me, at: VolumeSnapshotRef) -> () { me.delete_snapshot(at) }
    mutate volume_snapshot_restore(me, at: VolumeSnapshotRef) -> () { me.restore_snapshot(at) }
    read volume_snapshots(me, at: VolumeRef) -> Vec<VolumeSnapshot> { me.snapshots(at) }
    mutate volume_refresh(me, request: VolumeRefresh) -> () { me.refresh_volume(request) }
    mutate volume_rebuild(me, request: VolumeRebuild) -> () { me.rebuild_volume(request) }
    read volume_export(me, request: VolumeExport) -> WithFds<SessionId> { me.export_volume(request) }
    mutate volume_import(me, request: VolumeImport) -> WithFds<SessionId> { me.import_volume(request) }

    read volume_open(me, at: VolumeRef) -> WithFds<SessionId> { me.open_volume(at) }

    mutate backup_create(me, request: BackupCreate) -> BackupFacts { me.create_backup(&request) }
    mutate backup_stage(me, id: BackupId) -> WithFds<()> {
        let fd = memfd_create("karst-staged", MemfdFlags::CLOEXEC).map_err(std::io::Error::from)?;
        let ours = fd.try_clone()?;
        me.lock().staged_backups.insert(id, ours.into());
        Ok(WithFds { value: (), fds: vec![fd] })
    }
    read backup_inspect(me, id: BackupId) -> BackupFacts { me.inspect_backup(id) }
    read backup_open(me, id: BackupId) -> WithFds<BackupFacts> {
        let state = me.lock();
        let data = state.backups.get(&id).ok_or_else(|| Error::not_found("this host does not have the backup"))?;
        let value = BackupFacts { size: data.len() as u64, index: serde_json::Value::Null };
        Ok(WithFds { value, fds: vec![super::files::content(data)?] })
    }
    mutate backup_delete(me, id: BackupId) -> () {
        let mut state = me.lock();
        state.backups.remove(&id);
        state.staged_backups.remove(&id);
        Ok(())
    }
    mutate volume_fill(me, request: VolumeFill) -> VolumeFilled { me.fill_volume(&request) }
    mutate volume_write(me, request: VolumeWrite) -> () { me.write_volume(&request) }

    mutate image_stage(me, part: ImageStage) -> WithFds<ImageStaged> {
        let fd = memfd_create("karst-staged", MemfdFlags::CLOEXEC).map_err(std::io::Error::from)?;
        let ours = fd.try_clone()?;
        me.lock().staged.insert((part.image, part.part), ours.into());
        Ok(WithFds { value: ImageStaged { limit: 1 << 30 }, fds: vec![fd] })
    }
    read image_staged(me, _request: ()) -> Vec<ImageId> {
        let images: std::collections::BTreeSet<ImageId> = me.lock().staged.keys().map(|(image, _)| *image).collect();
        Ok(images.into_iter().collect())
    }
    mutate image_import(me, request: ImageImport) -> ImageFacts { me.import(&request) }
    mutate image_build(me, request: ImageBuild) -> ImageFacts { me.build(request).await }
    mutate image_publish(me, request: ImagePublish) -> ImageFacts { me.publish_image(&request) }
    mutate image_delete(me, image: ImageId) -> () {
        let mut state = me.lock();
        state.images.remove(&image);
        state.staged.retain(|(of, _), _| *of != image);
        Ok(())
    }
    read image_export(me, image: ImageId) -> WithFds<Vec<ImageFile>> {
        let state = me.lock();
        let image = state.images.get(&image).ok_or_else(|| Error::not_found(format!("image {image} is not on this host")))?;
        let (mut value, mut fds) = (vec![], vec![]);
        for (part, file, size) in &image.parts {
            let mut file = file.try_clone()?;
            file.seek(SeekFrom::Start(0))?;
            let mut data = vec![];
            file.read_to_end(&mut data)?;
            // Of its own: descriptors of one memory file would share their place in it.
            fds.push(super::files::content(&data)?);
            value.push(ImageFile { part: *part, size: *size, filename: format!("{}.{part:?}", image.facts.fingerprint).to_lowercase() });
        }
        Ok(WithFds { value, fds })
    }

    read keys_hand(me, request: KeysHand) -> () {
        me.hand_keys(request);
        Ok(())
    }
    mutate guest_start(me, spec: GuestSpec) -> Observed { me.start(spec) }
    mutate guest_stop(me, request: GuestStop) -> Observed { me.stop(request).await }
    read guest_ask(me, request: GuestAsk) -> () { me.ask(request).await }
    mutate guest_pause(me, guest: GuestRef) -> Observed { me.set_frozen(guest, true) }
    mutate guest_resume(me, guest: GuestRef) -> Observed { me.set_frozen(guest, false) }
    mutate guest_quiesce(me, request: GuestQuiesce) -> u32 {
        let mut state = me.settled();
        let guest = state.running(request.guest)?;
        if guest.spec.kind == InstanceKind::Container {
            return Ok(0);
        }
        if guest.state == karst_model::instance::RuntimeState::Paused && !guest.still {
            return Err(Error::conflict("the guest is frozen; resume it first"));
        }
        guest.demand_not_halted()?;
        guest.still = true;
        Ok(1)
    }
    mutate guest_thaw(me, guest: GuestRef) -> u32 {
        let mut state = me.settled();
        let guest = state.running(guest)?;
        if guest.still && guest.state == karst_model::instance::RuntimeState::Paused {
            return Err(Error::conflict("the guest is frozen; resume it first"));
        }
        Ok(u32::from(std::mem::take(&mut guest.still)))
    }
    mutate guest_update(me, spec: GuestSpec) -> Applied {
        let mut spec = spec;
        let mut state = me.settled();
        me.check_guest(&state, &spec)?;
        spec.limits.resolve_share(me.options.memory.bytes())?;
        let has = state.guests.get(&spec.instance).map(|g| g.spec.clone());
        state.take_guest_keys(&spec, has.as_ref())?;
        if state.guests.get(&spec.instance).is_some_and(|g| g.spec.disks != spec.disks) {
            state.demand_no_copy(spec.instance)?;
        }
        let guest = state.running(GuestRef { instance: spec.instance, generation: spec.generation })?;
        let of = |s: &GuestSpec| (s.limits.clone(), s.disks.clone(), s.nics.clone());
        if guest.refuses_update && of(&guest.spec) != of(&spec) {
            return Err(Error::conflict("the guest uses more than that"));
        }
        let slots = |spec: &GuestSpec| -> std::collections::BTreeSet<String> {
            let disks = spec.disks.iter().map(|d| d.slot.clone());
            disks.chain(spec.nics.iter().map(|n| n.slot.clone())).collect()
        };
        let before = slots(&guest.spec);
        let mut pending = vec![];
        if spec.kind == InstanceKind::VirtualMachine {
            pending.extend(super::threads::resize(&mut guest.spec, &spec));
            // What it shares with its host is not plugged while it runs.
            let shared = |disks: &[DiskSpec]| -> Vec<_> {
                disks.iter().filter(|d| d.path.is_some()).cloned().collect()
            };
            let (now, wanted) = (shared(&guest.spec.disks), shared(&spec.disks));
            let changed = now.iter().chain(&wanted).filter(|d| !(now.contains(d) && wanted.contains(d)));
            let names: std::collections::BTreeSet<_> = changed.map(|d| format!("devices.{}", d.name)).collect();
            pending.extend(names);
            let mut drives: Vec<_> = spec.disks.iter().filter(|d| d.path.is_none()).cloned().collect();
            pending.extend(super::threads::update(guest, &spec, &mut drives));
            let ports = |spec: &GuestSpec| spec.machine.as_ref().map(|m| m.lines.clone()).unwrap_or_default();
            let (now_there, then) = (ports(&guest.spec), ports(&spec));
            let changed = now_there.iter().chain(&then).filter(|l| !(now_there.contains(l) && then.contains(l)));
            let names: std::collections::BTreeSet<_> = changed.map(|l| format!("devices.{}", l.name)).collect();
            pending.extend(names);
            guest.spec.disks = drives.into_iter().chain(now).collect();
        } else {
            guest.spec.limits = spec.limits.clone();
            guest.spec.disks = spec.disks.clone();
        }
        guest.spec.nics = spec.nics.clone();
        if spec.security != guest.spec.security {
            pending.push("security.nesting".into());
        }
        if pending.is_empty() {
            guest.applied_spec_version = guest.applied_spec_version.max(spec.spec_version);
        }
        if spec.kind == InstanceKind::VirtualMachine {
            let after = slots(&guest.spec);
            for slot in before.difference(&after) {
                me.happens(spec.instance, Happened::DeviceRemoved { slot: slot.clone() });
            }
            for slot in after.difference(&before) {
                me.happens(spec.instance, Happened::DeviceAdded { slot: slot.clone() });
            }
        }
        Ok(Applied { pending })
    }
    mutate machine_copy_begin(me, request: MachineCopyBegin) -> () { me.begin_copy(request) }
    read machine_copy_state(me, at: MachineCopyRef) -> DiskCopyState { me.copy_state(at) }
    mutate machine_copy_speed(me, request: MachineCopySpeed) -> () { me.set_copy_speed(request) }
    mutate machine_copy_end(me, request: MachineCopyEnd) -> () { me.end_copy(request) }
    mutate machine_layers_add(me, request: MachineLayersAdd) -> () { me.add_layers(request) }
    mutate machine_layers_take_back(me, request: MachineLayersAdd) -> bool { me.take_layers_back(request) }
    mutate machine_merge_begin(me, request: MachineMergeBegin) -> () { me.begin_merge(request) }
    mutate machine_merge_end(me, request: MachineMergeEnd) -> () { me.end_merge(request) }
    mutate machine_checkpoint_create(me, request: MachineCheckpointCreate) -> () { me.create_checkpoint(request) }
    mutate machine_checkpoint_delete(me, request: MachineCheckpointDelete) -> () { me.delete_checkpoint(request) }
    read machine_checkpoints(me, request: MachineCheckpoints) -> Vec<CheckpointMark> { me.checkpoints(request) }
    mutate machine_backup_begin(me, request: MachineBackupBegin) -> () { me.begin_backup(request) }
    read machine_backup_state(me, at: MachineBackupRef) -> DiskBackupState { me.backup_state(at) }
    mutate machine_backup_end(me, at: MachineBackupRef) -> () { me.end_backup(at) }
    mutate machine_memory_begin(me, request: MachineMemoryBegin) -> () { me.begin_memory(request) }
    read machine_memory_state(me, at: MachineMemoryRef) -> MemoryState { me.memory_state(at) }
    read machine_memory_dump(me, request: MachineDump) -> WithFds<u64> { me.dump_memory(request) }
    mutate machine_memory_end(me, request: MachineMemoryEnd) -> () { me.end_memory(request) }
    read memory_file_read(me, path: String) -> SavedMemory { me.read_memory_file(&path) }
    mutate memory_file_change(me, request: MemoryFileChange) -> () { me.change_memory_file(request) }
    mutate guest_destroy(me, instance: InstanceId) -> () {
        let mut state = me.settled();
        if state.guests.get(&instance).is_some_and(Guest::runs) {
            return Err(Error::conflict(format!("instance {instance} runs; stop it first")));
        }
        state.guests.remove(&instance);
        state.outputs.retain(|output, _| output.instance != instance);
        state.machine_states.retain(|(i, _), _| *i != instance);
        state.arrived.remove(&instance);
        state.histories.remove(&instance);
        state.forget_copies(instance);
        state.forget_memory(instance);
        Ok(())
    }
    mutate machine_memory_drop(me, instance: InstanceId) -> () {
        if let Some(guest) = me.settled().guests.get_mut(&instance) {
            if guest.runs() {
                return Err(Error::conflict("the guest is running; stop it first"));
            }
            guest.saved = false;
        }
        Ok(())
    }
    mutate machine_state_save(me, request: MachineStateSave) -> () {
        let MachineStateRef { instance, snapshot } = request.at;
        let mut state = me.settled();
        if state.machine_states.contains_key(&(instance, snapshot)) {
            return Ok(());
        }
        let Some(guest) = state.guests.get(&instance) else {
            return match state.arrived.contains(&instance) && !request.memory {
                true => state.set_machine_state(instance, Some(snapshot), true),
                false => Ok(()),
            };
        };
        let pausing = guest.state == karst_model::instance::RuntimeState::Paused && guest.halt.is_none();
        if request.memory && !pausing {
            return Err(Error::conflict("memory is kept of a machine that is paused"));
        }
        if request.memory {
            state.demand_no_copy(instance)?;
        }
        let memory = request.memory || (guest.saved && !guest.runs());
        state.machine_states.insert((instance, snapshot), memory);
        Ok(())
    }
    mutate machine_state_restore(me, request: MachineStateRestore) -> () {
        let MachineStateRef { instance, snapshot } = request.at;
        let mut state = me.settled();
        let memory = state.machine_states.get(&(instance, snapshot)).copied().unwrap_or(false);
        if request.memory && !memory {
            return Err(Error::not_found("the snapshot has no memory of the virtual machine"));
        }
        if let Some(guest) = state.guests.get_mut(&instance) {
            if guest.runs() {
                return Err(Error::conflict("the guest is running; stop it first"));
            }
            guest.saved = request.memory;
        }
        Ok(())
    }
    mutate machine_state_copy(me, request: MachineStateCopy) -> () {
        let MachineStateCopy { from, at, to, to_at } = request;
        if from == to {
            return Err(Error::invalid("to", "a machine is not copied to itself"));
        }
        let mut state = me.settled();
        let there = state.has_machine_state(from, at);
        state.set_machine_state(to, to_at, there)
    }
    mutate machine_state_delete(me, at: MachineStateRef) -> () {
        me.settled().machine_states.remove(&(at.instance, at.snapshot));
        Ok(())
    }
    read guest_observe_all(me, _request: ()) -> Vec<Observed> {
        Ok(me.settled().guests.values().map(Guest::observed).collect())
    }
    read guest_metrics(me, instances: Vec<InstanceId>) -> Vec<(InstanceId, Metrics)> {
        let now = me.env.monotonic();
        let mut state = me.settled();
        let wanted = if instances.is_empty() { state.guests.keys().copied().collect() } else { instances };
        let after = me.options.address_after;
        let time = me.env.now();
        let mut all = vec![];
        for id in wanted {
            let Some(mut metrics) = state.metrics(id, now, after) else { continue };
            metrics.sampled_at = Some(time.as_millisecond());
            let (meter, series) = state.histories.entry(id).or_insert_with(|| (Meter::default(), history::empty()));
            if let Some(minute) = meter.take(now, time.as_second(), &metrics) {
                history::note(series, &minute, time.as_second());
            }
            all.push((id, metrics));
        }
        Ok(all)
    }
    read guest_details(me, instances: Vec<InstanceId>) -> Vec<(InstanceId, Metrics)> {
        let now = me.env.monotonic();
        let mut state = me.settled();
        let wanted = if instances.is_empty() { state.guests.keys().copied().collect() } else { instances };
        let after = me.options.address_after;
        let time = Some(me.env.now().as_millisecond());
        let detailed = |id| {
            let metrics = state.metrics(id, now, after)?;
            let details = State::details(&metrics);
            Some((id, Metrics { sampled_at: time, details: Some(Box::new(details)), ..metrics }))
        };
        Ok(wanted.into_iter().filter_map(detailed).collect())
    }
    read guest_history(me, instance: InstanceId) -> Vec<Series> {
        let now = me.env.now().as_second();
        let state = me.settled();
        let Some((meter, series)) = state.histories.get(&instance) else { return Ok(history::empty()) };
        let mut series = series.clone();
        if let Some(open) = meter.open() {
            history::note(&mut series, open, now);
        }
        Ok(series)
    }

    read machine_figures(me, instances: Vec<InstanceId>) -> Vec<(InstanceId, MachineFigures)> {
        let state = me.settled();
        let wanted: Vec<InstanceId> =
            if instances.is_empty() { state.guests.keys().copied().collect() } else { instances };
        let figures = |id: InstanceId| {
            let guest = state.guests.get(&id).filter(|g| demand_machine(g).is_ok())?;
            let spec = &guest.spec;
            let slots = std::iter::once(&spec.root.slot).chain(spec.disks.iter().map(|d| &d.slot));
            let disk = DiskFigures { read_requests: 4, read_bytes: 2048, read_ns: 900, ..Default::default() };
            Some((id, MachineFigures {
                disks: slots.map(|slot| (slot.clone(), disk.clone())).collect(),
                nics: spec.nics.iter().map(|n| (n.host_interface.clone(), NicFigures { sent_bytes: 90, sent_packets: 1, ..Default::default() })).collect(),
                vcpus: vec![VcpuFigures { index: 0, time_ns: 1_000_000, wait_ns: 5000, delay_ns: 3000, processor: 0 }],
                iothreads: super::threads::figures(spec),
                balloon: Some(BalloonFigures {
                    actual: spec.limits.memory.map_or(1 << 30, ByteSize::bytes),
                    inside: state.memory_inside(id, guest),
                }),
                user_ns: Some(700_000),
                system_ns: Some(300_000),
                monitored: state.monitored.get(&id) == Some(&guest.pid),
                dirty_rate: state.dirty_rate(id, guest.pid),
            }))
        };
        Ok(wanted.into_iter().filter_map(figures).collect())
    }
    read guest_agent(me, request: AgentCommand) -> serde_json::Value {
        let state = me.settled();
        let guest = state.guests.get(&request.instance).ok_or_else(|| no_guest(request.instance))?;
        demand_machine(guest)?;
        if !request.arguments.is_object() {
            return Err(Error::invalid("command", "a command has a name and an object of arguments"));
        }
        match request.command.as_str() {
            "guest-ping" | "guest-set-time" | "guest-set-user-password" | "guest-fstrim" => Ok(serde_json::json!({})),
            "guest-get-host-name" => Ok(serde_json::json!({"host-name": guest.spec.hostname})),
            "guest-get-time" => Ok(serde_json::json!(1_700_000_000_500_000_000_i64)),
            "guest-fsfreeze-freeze" | "guest-fsfreeze-thaw" => Ok(serde_json::json!(1)),
            "guest-get-fsinfo" => Ok(serde_json::json!([
                {"name": "sda1", "mountpoint": "/", "type": "ext4", "total-bytes": 1000, "used-bytes": 10,
                 "disk": [{"bus-type": "scsi", "bus": 0, "target": 0, "unit": 0, "dev": "/dev/sda1"}]},
            ])),
            "guest-get-disks" => Ok(serde_json::json!([{"name": "/dev/sda", "partition": false, "dependencies": []},
                {"name": "/dev/sda1", "partition": true, "dependencies": ["/dev/sda"]}])),
            "guest-get-vcpus" => Ok(serde_json::json!([{"logical-id": 0, "online": true, "can-offline": false}])),
            other => Err(Error::unsupported(format!("the guest agent does not allow {other}"))),
        }
    }
    read machine_interrupt(me, guest: GuestRef) -> () {
        let mut state = me.settled();
        demand_machine(state.running(guest)?)
    }
    read machine_wake(me, guest: GuestRef) -> () {
        let mut state = me.settled();
        demand_machine(state.running(guest)?)
    }
    read machine_monitor(me, request: MonitorCommand) -> MonitorAnswer {
        let second = me.env.now().as_second();
        me.settled().monitor(request, second)
    }
    read machine_events(me, _request: ()) -> WithFds<()> { me.settled().follow() }
    read machine_threshold(me, request: DiskThresholdSet) -> () {
        request.check()?;
        me.settled().set_threshold(request)
    }
    read machine_memory_period(me, request: MemoryPeriod) -> () {
        request.check()?;
        let mut state = me.settled();
        demand_machine(state.running(request.guest)?)?;
        state.memory_periods.insert(request.guest.instance, request.seconds);
        Ok(())
    }
    read machine_dirty_rate(me, request: DirtyRateRequest) -> () { me.settled().measure(request) }

    read entry_expected(me, _request: ()) -> () {
        let _ = me;
        Ok(())
    }
    read exec_start(me, request: ExecStart) -> WithFds<SessionId> { me.exec(request) }
    read exec_output_keep(me, output: ExecOutput) -> WithFds<SessionId> { me.keep_output(output) }
    read exec_outputs(me, instance: InstanceId) -> Vec<ExecOutput> {
        let state = me.settled();
        state.guests.get(&instance).ok_or_else(|| no_guest(instance))?;
        Ok(state.outputs.keys().filter(|o| o.instance == instance).copied().collect())
    }
    read exec_output_open(me, output: ExecOutput) -> WithFds<()> {
        let state = me.settled();
        state.guests.get(&output.instance).ok_or_else(|| no_guest(output.instance))?;
        let kept = state.outputs.get(&output).ok_or_else(|| output.missing())?;
        Ok(WithFds { value: (), fds: vec![super::files::content(kept)?] })
    }
    read exec_output_delete(me, output: ExecOutput) -> () {
        let mut state = me.settled();
        state.guests.get(&output.instance).ok_or_else(|| no_guest(output.instance))?;
        state.outputs.remove(&output).map(drop).ok_or_else(|| output.missing())
    }
    read session_resize(me, request: SessionResize) -> () {
        let state = me.lock();
        let session = state.sessions.get(&request.session).ok_or_else(|| no_session(request.session))?;
        session.resize(request.columns, request.rows);
        Ok(())
    }
    read session_signal(me, request: SessionSignal) -> () {
        if !(1..=64).contains(&request.signal) {
            return Err(Error::invalid("signal", format!("{} is not a signal", request.signal)));
        }
        let state = me.lock();
        let session = state.sessions.get(&request.session).ok_or_else(|| no_session(request.session))?;
        session.signal(request.signal);
        Ok(())
    }
    read session_wait(me, session: SessionId) -> i32 {
        let found = me.lock().sessions.get(&session).cloned();
        Ok(found.ok_or_else(|| no_session(session))?.wait().await)
    }
    read session_close(me, session: SessionId) -> () {
        let session = me.lock().sessions.remove(&session);
        if let Some(session) = session {
            session.end();
        }
        Ok(())
    }
    read console_attach(me, request: ConsoleAttach) -> WithFds<SessionId> { me.console(request, None) }
    read port_attach(me, request: PortAttach) -> WithFds<SessionId> {
        let PortAttach { instance, port, force } = request;
        me.console(ConsoleAttach { instance, force }, Some(port))
    }
    read guest_reset(me, guest: GuestRef) -> () {
        demand_machine(me.settled().running(guest)?)?;
        me.happens(guest.instance, Happened::Reset);
        Ok(())
    }
    read guest_keys(me, request: KeyPresses) -> () {
        let mut state = me.settled();
        let guest = state.guests.get_mut(&request.instance).ok_or_else(|| no_guest(request.instance))?;
        demand_machine(guest)?;
        for chord in request.chords {
            guest.console_extra.extend_from_slice(chord.join("-").as_bytes());
        }
        Ok(())
    }
    read guest_screenshot(me, instance: InstanceId) -> WithFds<()> {
        let state = me.settled();
        demand_machine(state.guests.get(&instance).ok_or_else(|| no_guest(instance))?)?;
        Ok(WithFds { value: (), fds: vec![super::files::content(b"\x89PNG\r\n\x1a\nsimulated")?] })
    }
    read display_attach(me, instance: InstanceId) -> WithFds<SessionId> {
        me.display(instance, DisplayProtocol::Vnc, None)
    }
    read display_attach_guarded(me, request: DisplayGuarded) -> WithFds<SessionId> {
        me.display(request.instance, DisplayProtocol::Vnc, Some(request.guard))
    }
    read display_attach_spice(me, request: SpiceChannel) -> WithFds<SessionId> {
        me.display(request.instance, DisplayProtocol::Spice, request.guard)
    }
    read display_guard(me, request: DisplayGuardSet) -> () { me.guard_display(request) }
    read console_log(me, request: ConsoleLog) -> Vec<u8> {
        let mut state = me.settled();
        let guest = state.guests.get_mut(&request.instance).ok_or_else(|| no_guest(request.instance))?;
        if request.runner {
            let log = if std::mem::replace(&mut guest.runner_cleared, request.clear) { "" } else { "simulated: started\n" };
            return Ok(log.as_bytes()[..log.len().min(request.max as usize)].to_vec());
        }
        let log = guest.console();
        if request.clear {
            guest.console_cleared = true;
            guest.console_extra.clear();
        }
        Ok(log[log.len().saturating_sub(request.max as usize)..].to_vec())
    }

    read file_open(me, file: FileRef) -> WithFds<FileOpened> {
        let (value, fd) = me.settled().open_file(&file)?;
        Ok(WithFds { value, fds: fd.into_iter().collect() })
    }
    read file_write(me, request: FileWriteRequest) -> WithFds<Option<SessionId>> { me.write(request) }
    read file_delete(me, file: FileRef) -> () { me.settled().delete_file(&file) }
}
