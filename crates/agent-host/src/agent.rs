//! The agent: what it is made of, how ids become things of this machine, and what it finds when it starts.

use crate::{
    HostPolicy,
    backup_room::BackupRoom,
    drives::{demand_raw, format},
    facts,
    ids::{CLAIMS, IdRanges},
    pools::{PoolPlace, Purpose},
    registry::{GuestRecord, Registry},
    reopen::{self, Unopened},
    sessions::Sessions,
    staging::Staging,
};
use karst_agent::{AgentEvent, EpochGuard, EventHub, GuestRef, VolumeRef, names::is_daemon_id};
use karst_ct_lxc::{LxcDriver, LxcOptions};
use karst_env::{EnvExt, Mutex, SharedEnv};
use karst_guest::{
    GuestDriver, Observed, ResolvedApplication, ResolvedDisk, ResolvedGuest, ResolvedNic, ThresholdReached,
};
use karst_host::sandbox::Launcher;
use karst_image::ImageStore;
use karst_model::{
    Error, ErrorKind, InstanceId, NetworkId, PoolId, Result, VolumeId,
    image::Application,
    instance::{Generation, InstanceKind, RuntimeState},
    news::MachineNews,
    node::HostFacts,
    spec::{DiskSpec, GuestSpec, NicSpec, PoolSpec},
    storage::VolumeContent,
};
use karst_network::NetworkDriver;
use karst_storage::{Located, PoolDriver};
use karst_vm_qemu::{QemuDriver, QemuOptions};
use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::sync::{OwnedMutexGuard, broadcast};

/// Whose the id range of the image worker is.
pub(crate) const WORKER: &str = "worker";

/// How long the end waits for pools to be synced: less than the launcher waits for the end.
const FLUSH: std::time::Duration = std::time::Duration::from_secs(30);

/// What the agent is made of.
#[derive(Debug, Clone)]
pub struct RealOptions {
    /// DIR; the agent keeps everything under `DIR/host`, which exists and is root's.
    pub dir: PathBuf,
    /// Short id of the daemon: six hexadecimal digits.
    pub daemon_id: String,
    /// What this host grants.
    pub policy: HostPolicy,
    /// How the image worker is started; `None`: `karstd image-worker`.
    pub worker: Option<(PathBuf, Vec<String>)>,
}

/// The agent of this machine.
pub struct RealAgent {
    pub(crate) env: SharedEnv,
    pub(crate) options: RealOptions,
    pub(crate) guard: Arc<EpochGuard>,
    pub(crate) events: Arc<EventHub>,
    pub(crate) sessions: Arc<Sessions>,
    pub(crate) registry: Registry,
    pub(crate) audit: Arc<Mutex<crate::audit::AuditLog>>,
    pub(crate) ids: IdRanges,
    pub(crate) history: crate::history::History,
    pub(crate) networks: NetworkDriver,
    pub(crate) images: ImageStore,
    pub(crate) staging: Arc<Staging>,
    pub(crate) backup_room: Arc<BackupRoom>,
    pub(crate) unopened: Unopened,
    /// Passphrases for calls to come.
    pub(crate) keys: crate::keys::Keys,
    pub(crate) dumping: crate::dumps::Dumping,
    /// How workers without privileges are started.
    pub(crate) launcher: Launcher,
    pub(crate) facts: tokio::sync::OnceCell<HostFacts>,
    pools: Mutex<HashMap<PoolId, Arc<dyn PoolDriver>>>,
    /// Places for looking at the space of a pool's volumes; those of a file system that does not answer stay taken.
    pub(crate) looks: Mutex<HashMap<PoolId, Arc<tokio::sync::Semaphore>>>,
    guests: Mutex<BTreeMap<InstanceId, GuestRecord>>,
    drivers: Vec<Arc<dyn GuestDriver>>,
    locks: Mutex<HashMap<uuid::Uuid, Arc<tokio::sync::Mutex<()>>>>,
}

/// Runs blocking work where it may block.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let outcome = tokio::task::spawn_blocking(work).await;
    outcome.map_err(|e| Error::internal("work of the host was broken off", e))?
}

impl RealAgent {
    /// Opens what is kept under `DIR/host`, finishes or undoes what an earlier process left half-done, and adopts networks
    /// and guests that really run.
    ///
    /// # Errors
    /// A damaged registry, or a host without what every guest needs. A network or guest that cannot be adopted is logged
    /// and does not stop the others.
    pub async fn open(env: SharedEnv, options: RealOptions) -> Result<Arc<Self>> {
        if !is_daemon_id(&options.daemon_id) {
            return Err(Error::invalid("daemon_id", "six hexadecimal digits"));
        }
        let root = options.dir.join("host");
        let registry = Registry::open(root.clone())?;
        let ids = IdRanges::open(CLAIMS, &options.daemon_id)?;
        let worker = ids.claim(WORKER, None)?;
        let launcher = match &options.worker {
            None => Launcher::own("image-worker", worker.base)?,
            Some((program, args)) => Launcher {
                program: program.clone(),
                args: args.iter().map(Into::into).collect(),
                id_base: worker.base,
            },
        };
        let guests_dir = root.join("guests");
        let mut drivers: Vec<Arc<dyn GuestDriver>> = vec![];
        match LxcDriver::new(LxcOptions { daemon_id: options.daemon_id.clone(), guests_dir }) {
            Ok(driver) => drivers.push(Arc::new(driver)),
            Err(e) => tracing::warn!(error = %e, "no containers on this host"),
        }
        match QemuDriver::new(QemuOptions {
            daemon_id: options.daemon_id.clone(),
            guests_dir: root.join("guests"),
        }) {
            Ok(driver) => drivers.push(Arc::new(driver)),
            Err(e) => tracing::warn!(error = %e, "no virtual machines on this host"),
        }
        let agent = Arc::new(Self {
            guard: Arc::new(EpochGuard::open(root.join("epoch"))?),
            events: Arc::default(),
            sessions: Arc::new(Sessions::new(env.clone())),
            networks: NetworkDriver::new(&options.daemon_id, root.join("networks")),
            images: ImageStore::open(root.join("images"), launcher.clone())
                .await?
                .with_sources(options.policy.recipes.sources.clone()),
            staging: Arc::new(Staging::open(
                env.clone(),
                registry.path("staging"),
                options.policy.uploads.clone(),
            )?),
            backup_room: Arc::new(BackupRoom::new(registry.path("backups"), options.policy.backups.clone())),
            unopened: Unopened::default(),
            keys: crate::keys::Keys::new(env.clone()),
            dumping: Default::default(),
            history: Default::default(),
            launcher,
            facts: tokio::sync::OnceCell::new(),
            pools: Mutex::default(),
            looks: Mutex::default(),
            guests: Mutex::default(),
            locks: Mutex::default(),
            audit: Arc::new(Mutex::new(crate::audit::AuditLog::open(root.join("audit"))?)),
            registry,
            ids,
            drivers,
            env,
            options,
        });
        crate::backups::sweep(&agent.registry.path("backups"))?;
        agent.adopt().await?;
        tokio::spawn(reopen::watch(Arc::downgrade(&agent)));
        crate::history::spawn(&agent);
        tokio::spawn(Staging::watch(Arc::downgrade(&agent.staging), agent.env.clone()));
        let facts = Arc::downgrade(&agent);
        // Asked for now, so that nobody waits for `qemu --version` later.
        tokio::spawn(async move {
            if let Some(agent) = facts.upgrade() {
                let _ = agent.facts().await;
            }
        });
        Ok(agent)
    }

    /// The guard of epochs, for the server in front.
    pub fn guard(&self) -> Arc<EpochGuard> {
        self.guard.clone()
    }

    /// What this host grants beyond ordinary guests. Nothing of it can be asked for over the wire yet.
    pub fn policy(&self) -> &HostPolicy {
        &self.options.policy
    }

    pub(crate) async fn facts(&self) -> Result<HostFacts> {
        let mut facts = self.facts.get_or_try_init(facts::collect).await?.clone();
        facts::complete(&mut facts, &self.options.policy).await;
        Ok(facts)
    }

    async fn adopt(self: &Arc<Self>) -> Result<()> {
        for pool in self.registry.pools()? {
            if self.registry.closed(pool.id).is_some() {
                continue;
            }
            // One that cannot be opened does not stop the others; it is tried again.
            if let Err(e) = self.open_pool(&pool, Purpose::Use).await {
                tracing::error!(pool = %pool.id, error = %e, context = e.context, "a pool cannot be opened");
                self.unopened.note(pool.id, e);
            }
        }
        let known = self.registry.guests()?;
        {
            let mut guests = self.guests.lock();
            guests.extend(known.iter().filter_map(|(id, record)| Some((*id, record.clone()?))));
        }
        for driver in &self.drivers {
            self.forward(driver.events(), driver.machine().map(|machines| machines.news()));
            if let Some(machines) = driver.machine() {
                self.forward_thresholds(machines.thresholds());
            }
            let adopted = driver.adopt().await;
            for observed in self.unless_failed(adopted, "guests cannot be adopted").unwrap_or_default() {
                tracing::info!(instance = %observed.instance, state = ?observed.state, "adopted a guest");
            }
        }
        self.adopt_dumps();
        for (id, record) in known {
            if record.is_some() || self.registry.arrived(id) {
                continue;
            }
            // A directory without a record: its start was not acknowledged, or its end was.
            let cleared = self.clear_unknown(id).await;
            self.unless_failed(
                cleared,
                "what is left of a guest could not be removed; it is tried at the next start",
            );
        }
        for claim in self.ids.claims()? {
            let known = claim.owner == WORKER || claim.owner.parse().is_ok_and(|id| self.guest(id).is_some());
            if !known {
                self.ids.release(claim.range, &claim.owner);
            }
        }
        let loose = self.networks.adopt_loose(|id| self.guest(id).is_some()).await;
        self.unless_failed(loose, "rules of guests without a network cannot be adopted");
        let adopted = self.networks.adopt().await;
        for adopted in self.unless_failed(adopted, "networks cannot be adopted").unwrap_or_default() {
            self.unless_failed(adopted.result, &format!("network {} is not whole", adopted.bridge));
        }
        Ok(())
    }

    /// One part that fails does not stop the others.
    fn unless_failed<T>(&self, outcome: Result<T>, what: &str) -> Option<T> {
        outcome.inspect_err(|e| tracing::error!(error = %e, context = e.context.as_deref(), "{what}")).ok()
    }

    async fn clear_unknown(&self, id: InstanceId) -> Result<()> {
        // Nobody was told that it runs; a keeper that has it all the same ends here.
        let dir = self.registry.guest_dir(id);
        karst_guest::keeper::end_keeper(&dir)?;
        karst_guest::keeper::wait_gone(&dir).await?;
        for driver in &self.drivers {
            driver.destroy(id).await?;
        }
        self.registry.remove_guest(id)
    }

    /// Hands a driver's events on.
    fn forward(
        self: &Arc<Self>,
        mut from: tokio::sync::mpsc::Receiver<Observed>,
        mut news: Option<broadcast::Receiver<MachineNews>>,
    ) {
        let weak = Arc::downgrade(self);
        tokio::spawn(async move {
            loop {
                // What happened in a guest before its end is told before that.
                let (news, observed) = tokio::select! {
                    biased;
                    news = next(&mut news) => (Some(news), None),
                    observed = from.recv() => (None, observed),
                };
                let Some(agent) = weak.upgrade() else { return };
                match (news, observed) {
                    (Some(news), _) => agent.events.publish(&AgentEvent::Machine { news }),
                    (None, Some(observed)) => agent.saw(&observed),
                    (None, None) => return,
                }
            }
        });
    }

    /// Hands thresholds of disks on that were reached.
    fn forward_thresholds(self: &Arc<Self>, mut from: broadcast::Receiver<ThresholdReached>) {
        let weak = Arc::downgrade(self);
        tokio::spawn(async move {
            loop {
                let reached = match from.recv().await {
                    Ok(reached) => reached,
                    Err(broadcast::error::RecvError::Lagged(n)) => {
                        tracing::warn!(
                            n,
                            "too many thresholds of disks were reached at once: nobody is told of some"
                        );
                        continue;
                    }
                    Err(broadcast::error::RecvError::Closed) => return,
                };
                let Some(agent) = weak.upgrade() else { return };
                agent.events.publish(&AgentEvent::DiskThreshold { reached });
            }
        });
    }

    /// A guest changed its state.
    pub(crate) fn saw(&self, observed: &Observed) {
        if observed.state == RuntimeState::Stopped {
            self.sessions.guest_ended(observed.instance);
        }
        self.events.publish(&AgentEvent::Guest { observed: Box::new(observed.clone()) });
    }

    /// One change of an object at a time.
    pub(crate) async fn lock(&self, id: uuid::Uuid) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock();
            if locks.len() > 4096 {
                locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            }
            locks.entry(id).or_default().clone()
        };
        lock.lock_owned().await
    }

    pub(crate) fn driver(&self, kind: InstanceKind) -> Result<&Arc<dyn GuestDriver>> {
        let found = self.drivers.iter().find(|d| d.kind() == kind);
        found.ok_or_else(|| Error::unsupported(format!("this host cannot run a {kind}")))
    }

    pub(crate) fn driver_warnings(&self) -> Vec<String> {
        self.drivers.iter().flat_map(|d| d.warnings()).collect()
    }

    pub(crate) fn guest(&self, id: InstanceId) -> Option<GuestRecord> {
        self.guests.lock().get(&id).cloned()
    }

    pub(crate) fn all_guests(&self) -> Vec<(InstanceId, GuestRecord)> {
        self.guests.lock().iter().map(|(id, r)| (*id, r.clone())).collect()
    }

    /// What a guest is, without a copy of what else is kept of it.
    pub(crate) fn kind(&self, id: InstanceId) -> Option<InstanceKind> {
        self.guests.lock().get(&id).map(|r| r.kind)
    }

    /// The same of all guests of this host.
    pub(crate) fn kinds(&self) -> Vec<(InstanceId, InstanceKind)> {
        self.guests.lock().iter().map(|(id, r)| (*id, r.kind)).collect()
    }

    /// Its driver, of a guest that was started here.
    pub(crate) fn known(&self, id: InstanceId) -> Result<(GuestRecord, &Arc<dyn GuestDriver>)> {
        let record =
            self.guest(id).ok_or_else(|| Error::not_found(format!("instance {id} is not on this host")))?;
        let driver = self.driver(record.kind)?;
        Ok((record, driver))
    }

    /// As [`Self::known`], for a guest of which no newer start is known than the one that is meant.
    pub(crate) fn meant(&self, guest: GuestRef) -> Result<(GuestRecord, &Arc<dyn GuestDriver>)> {
        let (record, driver) = self.known(guest.instance)?;
        not_older(&record, guest.instance, guest.generation)?;
        Ok((record, driver))
    }

    /// Has it a process, be it that it stands still or that an error halted it?
    pub(crate) async fn runs(&self, id: InstanceId) -> Result<bool> {
        let Ok((_, driver)) = self.known(id) else {
            return Ok(false);
        };
        Ok(!driver.observe(id).await?.state.is_down())
    }

    /// The running guest that a volume or network belongs to, if one runs.
    pub(crate) async fn user(&self, uses: impl Fn(&GuestRecord) -> bool) -> Result<Option<InstanceId>> {
        for (id, record) in self.all_guests() {
            if uses(&record) && self.runs(id).await? {
                return Ok(Some(id));
            }
        }
        Ok(None)
    }

    pub(crate) async fn open_pool(&self, spec: &PoolSpec, purpose: Purpose) -> Result<()> {
        if !self.pools.lock().contains_key(&spec.id) {
            let pool = self.pool_place(spec.id).open(spec, &self.options.policy, purpose).await?;
            self.note_abilities(spec.id, pool.abilities()).await;
            self.pools.lock().insert(spec.id, pool);
        }
        self.unopened.forget(spec.id);
        Ok(())
    }

    pub(crate) fn pool_place(&self, id: PoolId) -> PoolPlace {
        PoolPlace::new(&self.registry.path("pools"), id, self.launcher.clone())
    }

    pub(crate) fn pool(&self, id: PoolId) -> Result<Arc<dyn PoolDriver>> {
        let found = self.pools.lock().get(&id).cloned();
        found.ok_or_else(|| {
            let missing = || match self.demand_open(id) {
                Err(closed) => closed,
                Ok(()) => Error::not_found(format!("pool {id} is not on this host")),
            };
            self.unopened.why(id).unwrap_or_else(missing)
        })
    }

    pub(crate) fn has_pool(&self, id: PoolId) -> bool {
        self.pools.lock().contains_key(&id)
    }

    /// As it was before [`Self::forget_pool`].
    pub(crate) fn keep_pool(&self, id: PoolId, pool: Arc<dyn PoolDriver>) {
        self.pools.lock().insert(id, pool);
    }

    pub(crate) fn forget_pool(&self, id: PoolId) {
        self.pools.lock().remove(&id);
        self.looks.lock().remove(&id);
        self.unopened.forget(id);
    }

    /// Waits until what was made in the pools is on disk, for a time: who ends the daemon may end the machine next.
    pub async fn flush(&self) {
        let all = async {
            for (_, pool) in self.all_pools() {
                let _ = pool.flush().await; // it has said so
            }
        };
        if self.env.timeout(FLUSH, all).await.is_err() {
            tracing::warn!("new volumes are not known to be on disk yet");
        }
    }

    pub(crate) fn all_pools(&self) -> Vec<(PoolId, Arc<dyn PoolDriver>)> {
        self.pools.lock().iter().map(|(id, p)| (*id, p.clone())).collect()
    }

    pub(crate) async fn locate(&self, at: VolumeRef, user: Option<u32>) -> Result<Located> {
        self.pool(at.pool)?.locate(at.volume, user).await
    }

    /// Writes the record of a start, with an id range that is claimed before anything uses it.
    pub(crate) async fn remember(&self, spec: &GuestSpec) -> Result<GuestRecord> {
        let old = self.guest(spec.instance);
        let owner = spec.instance.0.to_string();
        let fixed = spec.security.idmap_base;
        let wanted = fixed.or(old.as_ref().map(|r| r.ids.base));
        let count = spec.security.idmap_size.unwrap_or(crate::ids::COUNT);
        let ids = self.ids.claim_many(&owner, wanted, count, fixed.is_some())?;
        // Of another start none is left.
        let copies = old.as_ref().filter(|old| old.generation == spec.generation);
        let copies = copies.map(|old| old.copies.clone()).unwrap_or_default();
        if let Some(old) = old {
            self.ids.release_rest(old.ids, ids, &owner);
        }
        let record = GuestRecord {
            kind: spec.kind,
            generation: spec.generation,
            ids,
            pool: spec.root.pool,
            root: spec.root.volume,
            volumes: spec.disks.iter().filter_map(DiskSpec::volume).map(|(_, volume)| volume).collect(),
            copies,
            interfaces: spec.nics.iter().map(|n| n.host_interface.clone()).collect(),
            networks: spec.nics.iter().filter_map(NicSpec::network).collect(),
            lent: crate::nics::lent(spec),
        };
        self.put_guest(spec.instance, record.clone()).await?;
        Ok(record)
    }

    /// Writes a guest's record, which may wait for the disk, and knows it from then on. Whoever is dropped meanwhile leaves both
    /// done: what is being written is known before.
    pub(crate) async fn put_guest(&self, id: InstanceId, record: GuestRecord) -> Result<()> {
        let old = self.guests.lock().insert(id, record.clone());
        let registry = self.registry.clone();
        let written = blocking(move || registry.put_guest(id, &record)).await;
        if written.is_err() {
            let mut guests = self.guests.lock();
            match old {
                Some(old) => drop(guests.insert(id, old)),
                None => drop(guests.remove(&id)),
            }
        }
        written
    }

    /// Adds to the record of a running guest what an update brings.
    pub(crate) async fn remember_beside(&self, spec: &GuestSpec, now: &GuestRecord) -> Result<()> {
        let mut record = now.clone();
        let volumes = spec.disks.iter().filter_map(DiskSpec::volume).map(|(_, volume)| volume);
        record.volumes.extend(volumes.filter(|v| !now.volumes.contains(v)));
        let interfaces = spec.nics.iter().map(|n| n.host_interface.clone());
        record.interfaces.extend(interfaces.filter(|i| !now.interfaces.contains(i)));
        record
            .networks
            .extend(spec.nics.iter().filter_map(NicSpec::network).filter(|n| !now.networks.contains(n)));
        record.lent.extend(crate::nics::lent(spec).into_iter().filter(|l| !now.lent.contains(l)));
        if record != *now {
            self.put_guest(spec.instance, record).await?;
        }
        Ok(())
    }

    pub(crate) async fn forget(&self, id: InstanceId) -> Result<()> {
        self.forget_memory(id).await?;
        let registry = self.registry.clone();
        blocking(move || registry.remove_guest(id)).await?;
        let record = self.guests.lock().remove(&id);
        if let Some(record) = record {
            self.ids.release(record.ids, &id.0.to_string());
        }
        Ok(())
    }

    /// Everything of a guest that can be wrong before anything is made of it.
    pub(crate) async fn check(&self, spec: &GuestSpec) -> Result<BTreeMap<NetworkId, String>> {
        check_hostname(&spec.hostname)?;
        let volume = self.pool(spec.root.pool)?.inspect(spec.root.volume).await?;
        let wanted = match spec.kind {
            InstanceKind::Container => VolumeContent::Filesystem,
            InstanceKind::VirtualMachine => VolumeContent::Block,
        };
        if volume.content != wanted {
            return Err(Error::invalid("root", format!("a {} cannot run from this volume", spec.kind)));
        }
        let mut networks: BTreeMap<NetworkId, String> = self.networks.list().await?.into_iter().collect();
        // Who runs keeps its place on a network that was stopped meanwhile.
        if let Some(record) = self.guest(spec.instance).filter(|r| r.generation == spec.generation) {
            let stopped = self.networks.detached().await?;
            networks.extend(stopped.into_iter().filter(|(id, _)| record.networks.contains(id)));
        }
        self.check_nics(spec, &networks).await?;
        let root = spec.root.volume;
        let other = self.all_guests().into_iter().filter(|(id, r)| *id != spec.instance && r.root == root);
        for (id, _) in other {
            if self.runs(id).await? {
                return Err(Error::conflict(format!("the root volume is in use by instance {id}")));
            }
        }
        Ok(networks)
    }

    /// Things of this machine in place of ids.
    pub(crate) async fn resolve(
        &self,
        mut spec: GuestSpec,
        record: &GuestRecord,
        networks: &BTreeMap<NetworkId, String>,
    ) -> Result<ResolvedGuest> {
        let memory = self.resolve_memory(&spec).await?;
        if spec.limits.memory_share.is_some() {
            spec.limits.resolve_share(self.facts.get_or_try_init(facts::collect).await?.memory)?;
        }
        if let Some(machine) = spec.machine.as_mut().filter(|_| memory.is_some()) {
            machine.resume = true;
        }
        let user = (spec.kind == InstanceKind::VirtualMachine).then_some(record.ids.base);
        let at = VolumeRef { pool: spec.root.pool, volume: spec.root.volume };
        if user.is_none() {
            self.give_tree(at, record.ids, spec.security.privileged).await?;
        }
        let located = self.locate(at, user).await?;
        if spec.root.shared {
            demand_raw(&spec.root.name, located.format)?;
        }
        let mut disks = vec![];
        for disk in spec.disks {
            let volume = disk.volume().map(|(pool, volume)| VolumeRef { pool, volume });
            if let Some(at) = volume.filter(|_| user.is_none()) {
                self.give_tree(at, record.ids, spec.security.privileged).await.map_err(|e| {
                    if e.field.is_some() { e } else { e.at(format!("devices.{}.source", disk.name)) }
                })?;
            }
            let mut found = self.resolve_disk(spec.instance, disk, user).await?;
            if let (Some(found), Some(at)) = (&mut found, volume) {
                found.io = self.driven(at.pool, found.io)?;
            }
            disks.extend(found);
        }
        let mut nodes = vec![];
        for node in &spec.nodes {
            nodes.extend(crate::nodes::resolve(&self.options.policy, node)?);
        }
        if spec.security.privileged {
            crate::nodes::demand_privileged(&self.options.policy)?;
        }
        if spec.security.raw_lxc.is_some() {
            crate::nodes::demand_raw(&self.options.policy, "raw.lxc")?;
        }
        let (sys, lib) = (Path::new("/sys/module"), Path::new("/lib/modules"));
        crate::nodes::demand_modules(&spec.security.modules, sys, lib)?;
        let mut proxies = vec![];
        for proxy in spec.proxies {
            proxies.push(crate::proxies::resolve(&self.options.policy, proxy)?);
        }
        let application = match spec.application {
            Some(program) => Some(self.given(program, &spec.nics).await?),
            None => None,
        };
        let mut nics = vec![];
        for nic in spec.nics {
            nics.push(ResolvedNic {
                link: crate::nics::resolve(nic.link, networks)?,
                host_name: nic.host_name,
                queue_length: nic.queue_length,
                vlans: nic.vlans,
                name: nic.name,
                slot: nic.slot,
                guest_name: nic.guest_name,
                mac: nic.mac,
                host_interface: nic.host_interface,
                mtu: nic.mtu,
                model: nic.model,
                options: nic.options,
                disconnected: nic.disconnected,
                pci: nic.pci,
                boot_priority: nic.boot_priority,
            });
        }
        let accelerator = spec.machine.as_ref().and_then(|m| m.accelerator);
        let tpm_secret = spec.machine.as_ref().and_then(|m| m.tpm_secret);
        Ok(ResolvedGuest {
            instance: spec.instance,
            kind: spec.kind,
            generation: spec.generation,
            spec_version: spec.spec_version,
            domain_id: spec.domain_id,
            daemon_id: self.options.daemon_id.clone(),
            hostname: spec.hostname,
            state_dir: self.registry.guest_dir(spec.instance),
            ids: record.ids,
            machine: spec.machine.map(|m| self.options.policy.with_render_node(m)),
            accelerator: match accelerator {
                Some(forced) => forced,
                None => karst_vm_qemu::probe::accelerator().kind,
            },
            limits: spec.limits,
            security: spec.security,
            root_layers: located.layers,
            root: ResolvedDisk {
                name: spec.root.name,
                slot: spec.root.slot,
                path: located.path,
                backing: located.backing,
                chain: crate::layers::chain(located.chain),
                format: format(located.format),
                mount_point: None,
                readonly: false,
                foreign: false,
                shift: false,
                opened: None,
                key: self.keys.of_disk(spec.instance, &spec.root.io),
                recursive: false,
                follow: false,
                cdrom: false,
                ejected: spec.root.detached,
                shared: spec.root.shared,
                io: self.driven(at.pool, spec.root.io)?,
                pci: spec.root.pci,
                boot_priority: spec.root.boot_priority,
                share: Default::default(),
            },
            disks,
            // Read at a start only.
            kernel: None,
            ports: BTreeMap::new(),
            given: BTreeMap::new(),
            nodes,
            proxies,
            nics,
            cloud_init: spec.cloud_init,
            files: spec.files,
            environment: spec.environment,
            application,
            memory,
            tpm_key: tpm_secret.and_then(|secret| self.keys.of_guest(spec.instance, secret)),
        })
    }

    /// An application container's program, and what its networks would tell an init.
    async fn given(&self, program: Application, nics: &[NicSpec]) -> Result<ResolvedApplication> {
        let mut all = ResolvedApplication { program, ..Default::default() };
        for nic in nics {
            let Some(network) = nic.network() else { continue };
            let Some(given) = self.networks.given(network, &nic.mac).await? else { continue };
            // One way out.
            let gateway = given.gateway.filter(|_| all.addresses.is_empty());
            all.addresses.insert(nic.name.clone(), (given.address, gateway));
            if all.nameservers.is_empty() {
                (all.nameservers, all.search) = (given.nameservers, given.search);
            }
        }
        Ok(all)
    }
}

pub(crate) fn not_older(record: &GuestRecord, id: InstanceId, meant: Generation) -> Result<()> {
    if record.generation > meant {
        return Err(Error::conflict(format!(
            "the host knows a newer start of instance {id} than the one that is meant"
        )));
    }
    Ok(())
}

/// A start that is to be ended never came here, and what runs is not of it: whoever takes back a start ends nothing else.
pub(crate) fn never_came(id: InstanceId) -> Error {
    Error::not_found(format!(
        "the start of instance {id} that is meant never came to this host; what runs there is of an earlier one"
    ))
}

/// A DNS label: it stands in files of the guest and in those of the network's name server.
fn check_hostname(name: &str) -> Result<()> {
    let good = (1..=63).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-');
    if good { Ok(()) } else { Err(Error::invalid("hostname", format!("{name:?} is not a DNS label"))) }
}

/// The state that nobody started here.
pub(crate) fn never_ran(guest: GuestRef) -> Observed {
    Observed::never_ran(guest.instance, guest.generation)
}

/// The next of the news, of which some may be missed.
async fn next(news: &mut Option<broadcast::Receiver<MachineNews>>) -> MachineNews {
    while let Some(from) = news {
        match from.recv().await {
            Ok(news) => return news,
            Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => *news = None,
        }
    }
    std::future::pending().await
}

/// A driver says "not found" of a guest that does not run; here it is known, and what fails is the state. What is not found of a
/// field is something else, such as the directory inside that a proxy is to listen in.
pub(crate) fn as_state(id: InstanceId) -> impl Fn(Error) -> Error {
    move |e| match e.kind {
        ErrorKind::NotFound if e.field.is_none() => {
            Error::conflict(format!("instance {id} is not running")).with_context(e)
        }
        _ => e,
    }
}

/// A volume's user, by its record.
pub(crate) fn has_volume(volume: VolumeId) -> impl Fn(&GuestRecord) -> bool {
    move |record| record.root == volume || record.volumes.contains(&volume) || record.copies.contains(&volume)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_found_of_a_field_is_not_the_guest() {
        let state = as_state(InstanceId(uuid::Uuid::nil()));
        let e = state(Error::not_found("the guest is not running"));
        assert!(e.is(ErrorKind::Conflict) && e.message.contains("is not running"), "{e}");
        let e = state(Error::not_found("there is no directory \"run/libvirt\"").at("devices.libvirt.listen"));
        assert!(e.is(ErrorKind::NotFound) && e.message.contains("run/libvirt"), "{e}");
    }
}
