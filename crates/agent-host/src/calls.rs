//! The calls, over the drivers.

use crate::{
    RealAgent,
    agent::{as_state, blocking, never_came, never_ran, not_older},
};
use async_trait::async_trait;
use karst_agent::*;
use karst_env::EnvExt;
use karst_guest::{
    Applied, DiskBackupState, DiskCopyState, FileKind, MachineFigures, Metrics, Observed, StopMode,
};
use karst_model::{
    AclId, BackupId, Error, ErrorKind, ImageId, InstanceId, NetworkId, PoolId, Result, SessionId, VolumeId,
    audit::{AuditEntry, AuditHead, AuditRange, AuditRecord, AuditVerdict},
    display::{DisplayGuard, DisplayProtocol},
    guest::{CheckpointMark, MonitorAnswer},
    history::Series,
    image::ImageFacts,
    instance::{HaltReason, InstanceKind, RuntimeState},
    memory::{MemoryState, SavedMemory},
    network::{ExternalInterface, Lease},
    node::HostFacts,
    pool_life::FoundSource,
    spec::{GuestSpec, NetworkSpec, PoolSpec, VolumeSpec},
    storage::{Abilities, PoolKind, Usage},
};
use karst_storage::OpenTree;
use rustix::pipe::{PipeFlags, pipe_with};
use std::{future::Future, os::fd::OwnedFd, path::Path, sync::Arc};
use tokio::sync::mpsc;

/// Guests asked at a time for their figures.
const AT_A_TIME: usize = 16;
/// Most of a console log that an answer carries.
const CONSOLE_LOG: u32 = 512 << 10;

impl RealAgent {
    /// What every call has: a deadline, and for mutations a fence.
    async fn act<T: Send>(
        &self,
        name: &'static str,
        mutation: bool,
        context: &CallContext,
        work: impl Future<Output = Result<T>> + Send,
    ) -> Result<T> {
        let fenced = async { if mutation { self.guard.run(context, work).await } else { work.await } };
        match self.env.timeout(context.deadline, fenced).await {
            Ok(outcome) => outcome,
            Err(_) => {
                Err(Error::timeout(format!("{name} did not end within its time ({:?})", context.deadline)))
            }
        }
    }

    /// What a network takes of this host beyond its own bridge.
    fn check_network(&self, spec: &NetworkSpec) -> Result<()> {
        let prefix = karst_agent::names::interface_prefix(&self.options.daemon_id);
        for port in spec.hosts.iter().filter_map(|h| h.port.as_ref()) {
            if !port.interface.starts_with(&prefix) {
                return Err(Error::forbidden(format!("{:?} is not an interface of a guest", port.interface)));
            }
        }
        for text in &spec.spec.external_interfaces {
            let name = ExternalInterface::parse(text)?.needs();
            self.policy().check_interface(name).map_err(|e| e.at("config.bridge.external_interfaces"))?;
        }
        if spec.spec.raw_dnsmasq.is_some() {
            crate::nodes::demand_raw(self.policy(), "raw.dnsmasq")?;
        }
        Ok(())
    }

    async fn remove_network(&self, id: NetworkId) -> Result<()> {
        let _lock = self.lock(id.0).await;
        if let Some(user) = self.user(|r| r.networks.contains(&id)).await? {
            return Err(Error::conflict(format!("instance {user}, which runs, still uses the network")));
        }
        self.networks.remove(id).await
    }

    async fn start(&self, spec: GuestSpec) -> Result<Observed> {
        let id = spec.instance;
        // Its keeper will enter a group.
        karst_host::moves::anticipate();
        let _lock = self.lock(id.0).await;
        let driver = self.driver(spec.kind)?;
        if let Some(record) = self.guest(id) {
            not_older(&record, id, spec.generation)?;
            if record.kind != spec.kind {
                return Err(Error::conflict(format!("instance {id} is a {} on this host", record.kind)));
            }
            let now = driver.observe(id).await?;
            // Nor does one that an error halted end for a start: it has its disks open.
            if !now.state.is_down() {
                if record.generation == spec.generation {
                    return Ok(now);
                }
                return Err(Error::conflict(format!(
                    "instance {id} still runs an earlier start; stop it first"
                )));
            }
        }
        let _volume = self.lock(spec.root.volume.0).await;
        let networks = self.check(&spec).await?;
        let first = self.guest(id).is_none() && !self.registry.arrived(id);
        let record = self.remember(&spec).await?;
        let loose = crate::nics::loose(&spec);
        let outcome = async {
            self.networks.set_loose(id, loose).await?;
            // What runs containers of its own cannot lay overlays over an overlay.
            if spec.kind == InstanceKind::Container && spec.security.nesting {
                self.pool(spec.root.pool)?.flatten(spec.root.volume).await?;
            }
            self.settle_merges(&spec).await?;
            let mut guest = self.resolve(spec, &record, &networks).await?;
            self.options.policy.demand_render_node(guest.machine.as_ref())?;
            guest.kernel = self.kernel(&guest).await?;
            guest.ports = self.ports(&guest).await?;
            guest.given = self.given_devices(&guest).await?;
            driver.start(&guest).await
        };
        match outcome.await {
            Ok(observed) => {
                self.saw(&observed);
                Ok(observed)
            }
            Err(e) => {
                // A guest that never ran leaves nothing behind.
                if first {
                    driver.destroy(id).await?;
                    self.networks.set_loose(id, vec![]).await?;
                    self.forget(id).await?;
                }
                Err(e)
            }
        }
    }

    async fn stop(&self, request: GuestStop) -> Result<Observed> {
        if matches!(request.mode, StopMode::Graceful { timeout } if timeout > StopMode::LONGEST) {
            let text = format!("a stop waits for {} seconds at most", StopMode::LONGEST.as_secs());
            return Err(Error::invalid("mode.timeout", text));
        }
        let id = request.guest.instance;
        if self.guest(id).is_none() {
            return Ok(never_ran(request.guest));
        }
        // No lock: a forced stop must get past a graceful one that waits.
        let (record, driver) = self.meant(request.guest)?;
        if record.generation < request.guest.generation && !driver.observe(id).await?.state.is_down() {
            return Err(never_came(id));
        }
        if let StopMode::Graceful { .. } = request.mode {
            let now = driver.observe(id).await?;
            if now.state == RuntimeState::Running {
                self.saw(&Observed { state: RuntimeState::Stopping, ..now });
            }
        }
        match driver.stop(id, request.mode).await {
            Ok(observed) => {
                self.saw(&observed);
                Ok(observed)
            }
            Err(e) => {
                if let Ok(now) = driver.observe(id).await {
                    self.saw(&now);
                }
                Err(e)
            }
        }
    }

    async fn freeze(&self, guest: GuestRef, frozen: bool) -> Result<Observed> {
        let _lock = self.lock(guest.instance.0).await;
        let (_, driver) = self.meant(guest)?;
        let outcome =
            if frozen { driver.pause(guest.instance).await } else { driver.resume(guest.instance).await };
        let observed = outcome.map_err(as_state(guest.instance))?;
        self.saw(&observed);
        Ok(observed)
    }

    async fn update(&self, spec: GuestSpec) -> Result<Applied> {
        let id = spec.instance;
        let _lock = self.lock(id.0).await;
        let (record, driver) = self.meant(GuestRef { instance: id, generation: spec.generation })?;
        if !self.runs(id).await? {
            return Err(Error::conflict(format!("instance {id} is not running")));
        }
        let networks = self.check(&spec).await?;
        // Before anything is plugged it is known; what goes is known until it is gone.
        self.remember_beside(&spec, &record).await?;
        self.networks.set_loose(id, crate::nics::loose(&spec)).await?;
        let guest = self.resolve(spec.clone(), &record, &networks).await?;
        let applied = driver.update(&guest).await.map_err(as_state(id))?;
        // A device that would not go, or come, is kept in mind until the guest ends; a key that waits concerns none.
        if !applied.pending.iter().any(|p| p.starts_with("devices")) {
            self.remember(&spec).await?;
        }
        Ok(applied)
    }

    async fn destroy(&self, id: InstanceId) -> Result<()> {
        let _lock = self.lock(id.0).await;
        let Ok((_, driver)) = self.known(id) else {
            if self.registry.arrived(id) {
                self.driver(InstanceKind::VirtualMachine)?.destroy(id).await?;
                self.forget(id).await?;
            }
            return Ok(());
        };
        if self.runs(id).await? {
            return Err(Error::conflict(format!("instance {id} runs; stop it first")));
        }
        driver.destroy(id).await?;
        self.networks.set_loose(id, vec![]).await?;
        self.forget(id).await
    }

    async fn observe_all(&self) -> Result<Vec<Observed>> {
        use futures::StreamExt;
        let observe = |(id, record): (InstanceId, crate::registry::GuestRecord)| async move {
            let observed = match self.driver(record.kind) {
                Ok(driver) => driver.observe(id).await,
                Err(e) => Err(e),
            };
            let observed = observed.unwrap_or_else(|e| {
                // One of which nothing can be said keeps nobody from what can be said of the others.
                tracing::warn!(instance = %id, error = %e, context = e.context, "a guest cannot be observed");
                let guest = GuestRef { instance: id, generation: record.generation };
                let halt = Some(HaltReason::Unknown { detail: e.message });
                Observed { state: RuntimeState::Error, halt, ..never_ran(guest) }
            });
            Observed {
                // Of a start that never came so far the driver knows nothing.
                generation: observed.generation.max(record.generation),
                ..observed
            }
        };
        Ok(futures::stream::iter(self.all_guests()).map(observe).buffered(AT_A_TIME).collect().await)
    }

    pub(crate) async fn metrics(
        &self,
        instances: Vec<InstanceId>,
        detailed: bool,
    ) -> Result<Vec<(InstanceId, Metrics)>> {
        let wanted = match instances.is_empty() {
            true => self.kinds(),
            false => instances.into_iter().filter_map(|id| Some((id, self.kind(id)?))).collect(),
        };
        let figures = |(id, kind)| async move {
            let driver = self.driver(kind).ok()?;
            match driver.sample(id, detailed).await {
                Ok(metrics) => {
                    let metrics = Metrics { sampled_at: Some(self.env.now().as_millisecond()), ..metrics };
                    let over = self.history.take(&*self.env, id, &metrics);
                    Some((id, metrics, over))
                }
                Err(e) => {
                    // It does not run, or ends at this moment: left out.
                    tracing::debug!(instance = %id, error = %e, "no figures");
                    None
                }
            }
        };
        let all = crate::samples::within(&self.env, wanted, figures).await;
        let minutes = all.iter().filter_map(|(id, _, over)| Some((*id, (*over)?))).collect();
        self.write_minutes(minutes).await;
        Ok(all.into_iter().map(|(id, metrics, _)| (id, metrics)).collect())
    }

    async fn figures(&self, instances: Vec<InstanceId>) -> Result<Vec<(InstanceId, MachineFigures)>> {
        use futures::StreamExt;
        let mut wanted = instances;
        if wanted.is_empty() {
            wanted.extend(self.all_guests().into_iter().map(|(id, _)| id));
        }
        let figures = |id| async move {
            let (_, driver) = self.known(id).ok()?;
            match driver.machine()?.figures(id).await {
                Ok(figures) => Some((id, figures)),
                Err(e) => {
                    tracing::debug!(instance = %id, error = %e, "no figures of the machine");
                    None
                }
            }
        };
        let all = futures::stream::iter(wanted).map(figures).buffered(AT_A_TIME);
        Ok(all.filter_map(|m| async { m }).collect().await)
    }

    async fn running(&self, id: InstanceId) -> Result<&Arc<dyn karst_guest::GuestDriver>> {
        let (_, driver) = self.known(id)?;
        match driver.observe(id).await?.state {
            RuntimeState::Stopped => Err(Error::conflict(format!("instance {id} is not running"))),
            RuntimeState::Error => Err(Error::conflict(format!(
                "instance {id} is halted by an error; resume it when the cause is gone, or stop it by force"
            ))),
            RuntimeState::Paused => Err(Error::conflict(format!("instance {id} is frozen; resume it first"))),
            _ => Ok(driver),
        }
    }

    async fn exec(&self, request: ExecStart) -> Result<WithFds<SessionId>> {
        if request.request.command.first().is_none_or(String::is_empty) {
            return Err(Error::invalid("command", "no program to run"));
        }
        check_owner(Some(request.request.uid), Some(request.request.gid))?;
        self.sessions.room()?;
        // It will enter the guest's groups.
        karst_host::moves::anticipate();
        let driver = self.running(request.instance).await?;
        let exec =
            driver.exec(request.instance, request.request).await.map_err(as_state(request.instance))?;
        let (value, fds) = self.sessions.exec(request.instance, exec);
        Ok(WithFds { value, fds })
    }

    async fn console(&self, request: ConsoleAttach) -> Result<WithFds<SessionId>> {
        self.sessions.room()?;
        let (_, driver) = self.known(request.instance)?;
        let stream =
            driver.console(request.instance, request.force).await.map_err(as_state(request.instance))?;
        let (value, fd) = self.sessions.console(request.instance, stream, driver.clone())?;
        Ok(WithFds { value, fds: vec![fd] })
    }

    /// What only virtual machines can.
    pub(crate) fn machine(&self, id: InstanceId) -> Result<&dyn karst_guest::GuestMachine> {
        let (_, driver) = self.known(id)?;
        driver.machine().ok_or_else(|| {
            Error::unsupported("only virtual machines have a screen, a keyboard and a reset button")
        })
    }

    async fn display(
        &self,
        id: InstanceId,
        protocol: DisplayProtocol,
        guard: Option<&DisplayGuard>,
    ) -> Result<WithFds<SessionId>> {
        self.sessions.room()?;
        let stream = self.machine(id)?.display(id, protocol, guard).await.map_err(as_state(id))?;
        let (value, fd) = self.sessions.display(id, stream)?;
        Ok(WithFds { value, fds: vec![fd] })
    }

    /// The driver of a guest's files, and where they lie when it does not run.
    async fn files(&self, file: &FileRef) -> Result<(&Arc<dyn karst_guest::GuestDriver>, Option<OpenTree>)> {
        check_path(&file.path)?;
        let driver = self.driver(file.kind)?;
        if driver.files().is_none() {
            return Err(Error::unsupported(format!(
                "files of a {} cannot be reached on this host",
                file.kind
            )));
        }
        let runs = self.runs(file.instance).await?;
        if file.kind == InstanceKind::VirtualMachine {
            return if runs {
                Ok((driver, None))
            } else {
                Err(Error::conflict("files of a virtual machine can be reached while it runs only; start it"))
            };
        }
        if let Some(record) = self.guest(file.instance)
            && record.root != file.root.volume
        {
            return Err(Error::conflict("the guest has another root volume on this host"));
        }
        // The root of a guest that runs is the guest's alone, however it is named.
        let others = self.all_guests().into_iter().filter(|(id, _)| *id != file.instance);
        for (id, _) in others.filter(|(_, record)| record.root == file.root.volume) {
            if self.runs(id).await? {
                return Err(Error::conflict("the volume is the root of a guest that runs"));
            }
        }
        let root = match runs {
            true => None,
            false => self.open_root(file).await?,
        };
        Ok((driver, root))
    }

    async fn open_file(&self, file: FileRef) -> Result<WithFds<FileOpened>> {
        let (driver, root) = self.files(&file).await?;
        let files = driver.files().ok_or_else(|| Error::unsupported("no files"))?;
        let opened = files.open(file.instance, path_of(&root), &file.path).await?;
        Ok(WithFds {
            value: FileOpened { info: opened.info, entries: opened.entries, target: opened.target },
            fds: opened.content.into_iter().collect(),
        })
    }

    async fn write_file(&self, request: FileWriteRequest) -> Result<WithFds<Option<SessionId>>> {
        let FileWriteRequest { file, mut write } = request;
        check_owner(write.uid, write.gid)?;
        if write.mode.is_some_and(|m| m > 0o7777) {
            return Err(Error::invalid("mode", "permission bits are at most 07777"));
        }
        let (driver, root) = self.files(&file).await?;
        write.path = file.path;
        let instance = file.instance;
        if write.kind != FileKind::File {
            let files = driver.files().ok_or_else(|| Error::unsupported("no files"))?;
            files.write(instance, path_of(&root), write, None).await?;
            return Ok(WithFds { value: None, fds: vec![] });
        }
        self.sessions.room()?;
        let (source, sink): (OwnedFd, OwnedFd) =
            pipe_with(PipeFlags::CLOEXEC).map_err(std::io::Error::from)?;
        let driver = driver.clone();
        let session = self.sessions.file_write(instance, async move {
            let files = driver.files().ok_or_else(|| Error::unsupported("no files"))?;
            files.write(instance, path_of(&root), write, Some(source)).await
        });
        Ok(WithFds { value: Some(session), fds: vec![sink] })
    }
}

fn path_of(root: &Option<OpenTree>) -> Option<&Path> {
    root.as_ref().map(|tree| tree.path.as_path())
}

/// The number that means "nobody" and "as it is" to the system is no user and no group.
fn check_owner(uid: Option<u32>, gid: Option<u32>) -> Result<()> {
    for (field, id) in [("uid", uid), ("gid", gid)] {
        if id == Some(u32::MAX) {
            return Err(Error::invalid(field, format!("{} is no id of a user or group", u32::MAX)));
        }
    }
    Ok(())
}

fn check_path(path: &str) -> Result<()> {
    if !path.starts_with('/') || path.contains('\0') || path.len() > 4095 {
        return Err(Error::invalid("path", format!("{path:?} is not an absolute path")));
    }
    if path.split('/').any(|part| part == "..") {
        return Err(Error::invalid("path", format!("{path:?} must not contain \"..\"")));
    }
    Ok(())
}

/// `read name(request) -> T { body }`: the body runs within [`RealAgent::act`].
macro_rules! calls {
    ($( $access:ident $name:ident($me:ident, $request:ident: $ty:ty $(, $with:ident)?) -> $answer:ty $body:block )+) => {
        #[async_trait]
        impl HostAgent for RealAgent {
            $( async fn $name(&self, context: &CallContext, $request: $ty) -> Result<$answer> {
                let $me = self;
                $( let $with = context.clone(); )?
                // In a box: the largest of them would be in every one.
                let work = Box::pin(async move $body);
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
        let log = me.audit.clone();
        blocking(move || log.lock().append(entries)).await
    }
    read audit_read(me, range: AuditRange) -> Vec<AuditRecord> {
        let log = me.audit.clone();
        blocking(move || log.lock().read(range)).await
    }
    read audit_verify(me, _request: ()) -> AuditVerdict {
        let log = me.audit.clone();
        blocking(move || {
            let mut log = log.lock();
            log.sync()?;
            log.verify()
        })
        .await
    }
    read host_facts(me, _request: ()) -> HostFacts {
        let mut facts = me.facts().await?;
        facts.warnings.extend(me.networks.warnings().await);
        facts.warnings.extend(me.unopened.warnings());
        facts.warnings.extend(me.driver_warnings());
        Ok(facts)
    }
    read host_resources(_me, _request: ()) -> karst_agent::resources::HostResources {
        blocking(|| Ok(crate::resources::Machine::default().resources())).await
    }
    read host_cpu_models(_me, _request: ()) -> Vec<karst_agent::resources::CpuModel> {
        let models = karst_vm_qemu::cpu::models().await?.into_iter();
        let told = |m: karst_vm_qemu::cpu::CpuModel| karst_agent::resources::CpuModel {
            name: m.name,
            vendor: m.vendor,
            features: m.features,
            missing: m.missing,
        };
        Ok(models.map(told).collect())
    }
    read self_check(me, _request: ()) -> SelfCheck { me.self_check_now().await }

    mutate pool_ensure(me, spec: PoolSpec) -> () { me.ensure_pool(spec).await }
    mutate pool_open(me, spec: PoolSpec) -> () { me.start_pool(spec).await }
    mutate pool_close(me, pool: PoolId) -> () { me.stop_pool(pool).await }
    read pool_sources(me, kind: PoolKind) -> Vec<FoundSource> { me.sources(kind).await }
    mutate pool_grow(me, request: PoolGrow) -> () { me.grow_pool(request).await }
    mutate pool_remove(me, pool: PoolId) -> () { me.remove_pool(pool).await }
    read pool_usage(me, pool: PoolId) -> Usage { me.space_of(pool).await }
    read pool_abilities(me, pool: PoolId) -> Option<Abilities> { Ok(me.pool(pool)?.abilities()) }
    read pool_flush(me, pool: PoolId) -> () { me.pool(pool)?.flush().await }
    mutate pool_describe(me, request: PoolDescribe) -> () { me.describe_pool(request).await }
    read pool_survey(me, request: PoolSurvey) -> PoolSurveyed { me.survey_pool(request).await }
    read pools_find(me, request: PoolsFind) -> Vec<FoundPool> { me.find_pools(request).await }

    read network_choose(me, wanted: NetworkChoose) -> NetworkChoice {
        Ok(NetworkChoice {
            name: me.networks.find_free_bridge_name(&wanted.name).await?,
            ipv4: me.networks.find_free_subnet(&wanted.taken).await?,
            ipv6: me.networks.find_free_subnet6().await?,
        })
    }
    mutate network_ensure(me, spec: NetworkSpec) -> () {
        let _lock = me.lock(spec.id.0).await;
        me.check_network(&spec)?;
        me.networks.ensure(&spec).await
    }
    mutate network_remove(me, network: NetworkId) -> () { me.remove_network(network).await }
    mutate network_stop(me, network: NetworkId) -> () {
        let _lock = me.lock(network.0).await;
        me.networks.stop(network).await
    }
    read network_leases(me, network: NetworkId) -> Vec<Lease> { me.networks.leases(network).await }
    read acl_log(me, r: AclLogRead) -> Vec<u8> { me.networks.acl_log(r.acl, r.max.min(ACL_LOG_BYTES) as usize).await }
    mutate acl_log_remove(me, acl: AclId) -> () { me.networks.acl_log_remove(acl).await }
    read neighbours(_me, request: NeighboursFind) -> Vec<Neighbour> {
        request.check()?;
        blocking(move || crate::nics::neighbours(&request)).await
    }
    read link_state(me, name: String) -> NetworkState { me.link_state_of(&name).await }
    read network_state(me, network: NetworkId) -> NetworkState {
        let state = me.networks.state(network).await?;
        Ok(NetworkState {
            mac: state.mac,
            mtu: state.mtu,
            up: state.up,
            addresses: state.addresses,
            counters: state.counters,
            ports: state.ports,
        })
    }

    mutate volume_create(me, spec: VolumeSpec) -> () {
        let _given = me.keys.until_then(KeyOwner::Volume(spec.id));
        me.create_volume(spec).await
    }
    mutate volume_delete(me, at: VolumeRef) -> () { me.delete_volume(at).await }
    mutate volume_resize(me, request: VolumeResize) -> () { me.resize_volume(request).await }
    read volume_usage(me, at: VolumeRef) -> Usage { me.pool(at.pool)?.usage(at.volume).await }
    read volume_usages(me, all: Vec<VolumeRef>) -> Vec<(VolumeId, Usage)> { me.volume_usages(all).await }

    mutate volume_snapshot_create(me, at: VolumeSnapshotRef) -> () { me.create_snapshot(at).await }
    mutate volume_snapshot_delete(me, at: VolumeSnapshotRef) -> () { me.delete_snapshot(at).await }
    mutate volume_snapshot_restore(me, at: VolumeSnapshotRef) -> () { me.restore_snapshot(at).await }
    read volume_snapshots(me, at: VolumeRef) -> Vec<VolumeSnapshot> { me.snapshots_of(at).await }
    mutate volume_refresh(me, request: VolumeRefresh) -> () { me.refresh_volume(request).await }
    mutate volume_rebuild(me, request: VolumeRebuild) -> () { me.rebuild_volume(request).await }
    read volume_export(me, request: VolumeExport) -> WithFds<SessionId> { me.export_volume(request).await }
    mutate volume_import(me, request: VolumeImport, context) -> WithFds<SessionId> { me.import_volume(context, request).await }

    read volume_open(me, at: VolumeRef) -> WithFds<SessionId> { me.open_volume(at).await }

    mutate backup_create(me, request: BackupCreate) -> BackupFacts { me.create_backup(request).await }
    mutate backup_stage(me, id: BackupId) -> WithFds<()> { me.stage_backup(id).await }
    read backup_inspect(me, id: BackupId) -> BackupFacts { me.inspect_backup(id).await }
    read backup_open(me, id: BackupId) -> WithFds<BackupFacts> { me.open_backup(id).await }
    mutate backup_delete(me, id: BackupId) -> () { me.delete_backup(id).await }
    mutate volume_fill(me, request: VolumeFill) -> VolumeFilled { me.fill_volume(request).await }
    mutate volume_write(me, request: VolumeWrite) -> () { me.write_volume(request).await }

    mutate image_stage(me, part: ImageStage) -> WithFds<ImageStaged> { me.stage(part).await }
    read image_staged(me, _request: ()) -> Vec<ImageId> { Ok(me.staging.images()) }
    mutate image_import(me, request: ImageImport) -> ImageFacts { me.import(request).await }
    mutate image_build(me, request: ImageBuild) -> ImageFacts { me.build(request).await }
    mutate image_publish(me, request: ImagePublish) -> ImageFacts { me.publish_image(request).await }
    mutate image_delete(me, image: ImageId) -> () { me.delete_image(image).await }
    read image_export(me, image: ImageId) -> WithFds<Vec<ImageFile>> { me.export(image).await }

    read keys_hand(me, request: KeysHand) -> () { me.keys.hand(request) }
    mutate guest_start(me, spec: GuestSpec) -> Observed {
        let _given = me.keys.until_then(KeyOwner::Guest(spec.instance));
        me.start(spec).await
    }
    mutate guest_stop(me, request: GuestStop) -> Observed { me.stop(request).await }
    read guest_ask(me, request: GuestAsk) -> () {
        let GuestAsk { guest, wish, by } = request;
        // No lock: nothing is waited for, and a stop by force must get past it.
        let (_, driver) = me.meant(guest)?;
        driver.ask(guest.instance, wish, by).await.map_err(as_state(guest.instance))
    }
    mutate guest_pause(me, guest: GuestRef) -> Observed { me.freeze(guest, true).await }
    mutate guest_resume(me, guest: GuestRef) -> Observed { me.freeze(guest, false).await }
    mutate guest_quiesce(me, request: GuestQuiesce) -> u32 {
        // No lock: a stop by force must get past an agent that is waited for.
        let (id, limit) = (request.guest.instance, request.limit);
        match me.meant(request.guest)?.1.quiesce() {
            Some(driver) => driver.freeze(id, limit).await.map_err(as_state(id)),
            None => Ok(0),
        }
    }
    mutate guest_thaw(me, guest: GuestRef) -> u32 {
        match me.meant(guest)?.1.quiesce() {
            Some(driver) => driver.thaw(guest.instance).await.map_err(as_state(guest.instance)),
            None => Ok(0),
        }
    }
    mutate guest_update(me, spec: GuestSpec) -> Applied {
        let _given = me.keys.until_then(KeyOwner::Guest(spec.instance));
        me.update(spec).await
    }
    mutate machine_state_save(me, request: MachineStateSave) -> () {
        let MachineStateRef { instance, snapshot } = request.at;
        let _lock = me.lock(instance.0).await;
        me.machines()?.state_save(instance, snapshot, request.memory).await
    }
    mutate machine_state_restore(me, request: MachineStateRestore) -> () {
        let MachineStateRef { instance, snapshot } = request.at;
        let _lock = me.lock(instance.0).await;
        me.machines()?.state_restore(instance, snapshot, request.memory).await
    }
    mutate machine_state_copy(me, request: MachineStateCopy) -> () { me.copy_machine(request).await }
    mutate machine_state_delete(me, at: MachineStateRef) -> () {
        let _lock = me.lock(at.instance.0).await;
        me.machines()?.state_delete(at.instance, at.snapshot).await
    }
    mutate machine_memory_drop(me, instance: InstanceId) -> () {
        let _lock = me.lock(instance.0).await;
        me.machines()?.memory_drop(instance).await
    }
    mutate machine_copy_begin(me, request: MachineCopyBegin) -> () { me.begin_copy(request).await }
    read machine_copy_state(me, at: MachineCopyRef) -> DiskCopyState { me.copy_state(at).await }
    mutate machine_copy_speed(me, request: MachineCopySpeed) -> () { me.set_copy_speed(request).await }
    mutate machine_copy_end(me, request: MachineCopyEnd) -> () { me.end_copy(request).await }
    mutate machine_layers_add(me, request: MachineLayersAdd) -> () { me.add_layers(request).await }
    mutate machine_layers_take_back(me, request: MachineLayersAdd) -> bool { me.take_layers_back(request).await }
    mutate machine_merge_begin(me, request: MachineMergeBegin) -> () { me.begin_merge(request).await }
    mutate machine_merge_end(me, request: MachineMergeEnd) -> () { me.end_merge(request).await }
    mutate machine_checkpoint_create(me, request: MachineCheckpointCreate) -> () { me.create_checkpoint(request).await }
    mutate machine_checkpoint_delete(me, request: MachineCheckpointDelete) -> () { me.delete_checkpoint(request).await }
    read machine_checkpoints(me, request: MachineCheckpoints) -> Vec<CheckpointMark> { me.checkpoints(request).await }
    mutate machine_backup_begin(me, request: MachineBackupBegin) -> () { me.begin_backup(request).await }
    read machine_backup_state(me, at: MachineBackupRef) -> DiskBackupState { me.backup_state(at).await }
    mutate machine_backup_end(me, at: MachineBackupRef) -> () { me.end_backup(at).await }
    mutate machine_memory_begin(me, request: MachineMemoryBegin) -> () { me.begin_memory(request).await }
    read machine_memory_state(me, at: MachineMemoryRef) -> MemoryState { me.memory_state(at).await }
    read machine_memory_dump(me, request: MachineDump) -> WithFds<u64> { me.dump_memory(request).await }
    mutate machine_memory_end(me, request: MachineMemoryEnd) -> () { me.end_memory(request).await }
    read memory_file_read(me, path: String) -> SavedMemory { me.read_memory_file(path).await }
    mutate memory_file_change(me, request: MemoryFileChange) -> () { me.change_memory_file(request).await }
    mutate guest_destroy(me, instance: InstanceId) -> () { me.destroy(instance).await }
    read guest_observe_all(me, _request: ()) -> Vec<Observed> { me.observe_all().await }
    read guest_metrics(me, instances: Vec<InstanceId>) -> Vec<(InstanceId, Metrics)> { me.metrics(instances, false).await }
    read guest_details(me, instances: Vec<InstanceId>) -> Vec<(InstanceId, Metrics)> { me.metrics(instances, true).await }
    read guest_history(me, instance: InstanceId) -> Vec<Series> { me.history_of(instance).await }

    read machine_figures(me, instances: Vec<InstanceId>) -> Vec<(InstanceId, MachineFigures)> { me.figures(instances).await }
    read guest_agent(me, request: AgentCommand) -> serde_json::Value {
        let AgentCommand { instance, command, arguments, limit } = request;
        if !command.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b)) || !arguments.is_object() {
            return Err(Error::invalid("command", "a command has a name and an object of arguments"));
        }
        let outcome = me.machine(instance)?.agent(instance, &command, arguments, limit).await;
        outcome.map_err(as_state(instance))
    }
    read machine_interrupt(me, guest: GuestRef) -> () {
        me.meant(guest)?;
        me.machine(guest.instance)?.interrupt(guest.instance).await.map_err(as_state(guest.instance))
    }
    read machine_wake(me, guest: GuestRef) -> () {
        me.meant(guest)?;
        me.machine(guest.instance)?.wake(guest.instance).await.map_err(as_state(guest.instance))
    }
    read machine_monitor(me, request: MonitorCommand) -> MonitorAnswer { me.monitor(request).await }
    read machine_events(me, _request: ()) -> WithFds<()> { me.monitor_events() }
    read machine_threshold(me, request: DiskThresholdSet) -> () {
        request.check()?;
        let DiskThresholdSet { guest, slot, bytes } = request;
        me.meant(guest)?;
        let machine = me.machine(guest.instance)?;
        machine.set_threshold(guest.instance, &slot, bytes).await.map_err(as_state(guest.instance))
    }
    read machine_memory_period(me, request: MemoryPeriod) -> () {
        request.check()?;
        let MemoryPeriod { guest, seconds } = request;
        me.meant(guest)?;
        let machine = me.machine(guest.instance)?;
        machine.set_memory_period(guest.instance, seconds).await.map_err(as_state(guest.instance))
    }
    read machine_dirty_rate(me, request: DirtyRateRequest) -> () {
        let DirtyRateRequest { instance, seconds, mode } = request;
        let machine = me.machine(instance)?;
        if !(1..=60).contains(&seconds) {
            return Err(Error::invalid("seconds", "memory is watched for 1 to 60 seconds"));
        }
        machine.measure_dirty_rate(instance, seconds, mode).await.map_err(as_state(instance))
    }

    read entry_expected(me, _request: ()) -> () {
        let _ = me;
        karst_host::moves::anticipate();
        Ok(())
    }
    read exec_start(me, request: ExecStart) -> WithFds<SessionId> { me.exec(request).await }
    read exec_output_keep(me, output: ExecOutput) -> WithFds<SessionId> { me.keep_output(output).await }
    read exec_outputs(me, instance: InstanceId) -> Vec<ExecOutput> { me.outputs(instance).await }
    read exec_output_open(me, output: ExecOutput) -> WithFds<()> { me.open_output(output).await }
    read exec_output_delete(me, output: ExecOutput) -> () { me.delete_output(output).await }
    read session_resize(me, request: SessionResize) -> () {
        me.sessions.get(request.session)?.resize(request.columns, request.rows).await
    }
    read session_signal(me, request: SessionSignal) -> () {
        let session = me.sessions.get(request.session)?;
        if !(1..=64).contains(&request.signal) {
            return Err(Error::invalid("signal", format!("{} is not a signal", request.signal)));
        }
        session.signal(request.signal).await
    }
    read session_wait(me, session: SessionId) -> i32 { me.sessions.get(session)?.wait().await }
    read session_close(me, session: SessionId) -> () {
        me.sessions.close(session).await;
        Ok(())
    }
    read console_attach(me, request: ConsoleAttach) -> WithFds<SessionId> { me.console(request).await }
    read port_attach(me, request: PortAttach) -> WithFds<SessionId> { me.port(request).await }
    read guest_reset(me, guest: GuestRef) -> () {
        let _lock = me.lock(guest.instance.0).await;
        me.meant(guest)?;
        me.machine(guest.instance)?.reset(guest.instance).await.map_err(as_state(guest.instance))
    }
    read guest_keys(me, request: KeyPresses) -> () {
        let id = request.instance;
        // Not trusted to have been checked.
        let chords: Vec<String> = request.chords.iter().map(|c| c.join("-")).collect();
        let chords = karst_model::keyboard::chords(&chords)?;
        me.machine(id)?.press(id, &chords).await.map_err(as_state(id))
    }
    read guest_screenshot(me, instance: InstanceId) -> WithFds<()> {
        let file = me.machine(instance)?.screenshot(instance).await.map_err(as_state(instance))?;
        Ok(WithFds { value: (), fds: vec![file] })
    }
    read display_attach(me, instance: InstanceId) -> WithFds<SessionId> {
        me.display(instance, DisplayProtocol::Vnc, None).await
    }
    read display_attach_guarded(me, request: DisplayGuarded) -> WithFds<SessionId> {
        me.display(request.instance, DisplayProtocol::Vnc, Some(&request.guard)).await
    }
    read display_attach_spice(me, request: SpiceChannel) -> WithFds<SessionId> {
        me.display(request.instance, DisplayProtocol::Spice, request.guard.as_ref()).await
    }
    read display_guard(me, request: DisplayGuardSet) -> () {
        let id = request.instance;
        me.machine(id)?.guard_display(id, request.guard.as_ref()).await.map_err(as_state(id))
    }
    read console_log(me, request: ConsoleLog) -> Vec<u8> {
        let (_, driver) = me.known(request.instance)?;
        let max = request.max.min(CONSOLE_LOG) as usize;
        if request.runner {
            let log = driver.runner_log(request.instance, max, request.clear).await?;
            return Ok(crate::logs::without_places(&log, &me.options.dir));
        }
        match driver.console_log(request.instance, max, request.clear).await {
            // Nothing was ever written.
            Err(e) if e.is(ErrorKind::NotFound) => Ok(vec![]),
            other => other,
        }
    }

    read file_open(me, file: FileRef) -> WithFds<FileOpened> { me.open_file(file).await }
    read file_write(me, request: FileWriteRequest) -> WithFds<Option<SessionId>> { me.write_file(request).await }
    read file_delete(me, file: FileRef) -> () {
        let (driver, root) = me.files(&file).await?;
        let files = driver.files().ok_or_else(|| Error::unsupported("no files"))?;
        files.delete(file.instance, path_of(&root), &file.path).await
    }
}
