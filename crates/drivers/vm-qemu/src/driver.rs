//! The driver.

mod capabilities;

use crate::{
    argv::cpu_count,
    backups, bitmaps, copies, details, display, figures,
    inside::Inside,
    launch::{self, Groups, explain, limits, prepare},
    machine::{Ask, Machine, Tell, Tells, exit_reason, own, seen},
    memory_files, monitor,
    placement::Placed,
    plug, ports, probe,
    qmp::Qmp,
    record::Record,
    resize, saved, states, still, threads, threshold, tpm, virtiofs,
};
use async_trait::async_trait;
use karst_guest::{
    Applied, AskedBy, DiskBackups, DiskCopies, DiskMerges, Exec, ExecRequest, FileWrite, GuestDriver,
    GuestFiles, GuestMachine, GuestWish, Interface, MachineFigures, MachineFiles, MemoryFiles, Metrics,
    MonitorAnswer, MonitorEvent, Observed, OpenedFile, Quiesce, ResolvedGuest, Silence, StopMode,
    ThresholdReached,
    keeper::{self, End, Keeper, Requested, State, Status},
    silence,
};
use karst_host::cgroup::{CgroupLimits, Cgroups};
use karst_model::{
    Error, ErrorKind, InstanceId, Result, SnapshotId,
    display::{DisplayGuard, DisplayProtocol},
    instance::{HaltReason, InstanceKind, RuntimeState},
    news::MachineNews,
    node::AcceleratorKind,
    threads::BESIDE,
};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, HashMap},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, Weak},
    time::Duration,
};
use tokio::{
    sync::{broadcast, mpsc},
    time::timeout,
};

/// Events of QEMU's monitors that who follows them has not taken yet; who is slower misses some.
const HEARD: usize = 1024;

/// How long QEMU may take from its execution to its greeting.
const GREETING: Duration = Duration::from_secs(20);
/// How long a QEMU that is told to end may take, from the telling, for what it has to write.
const WRITE: Duration = Duration::from_secs(10);
/// How long a killed QEMU may take to be gone.
const FORCE: Duration = Duration::from_secs(20);

/// What the driver is made with.
#[derive(Debug, Clone)]
pub struct QemuOptions {
    /// Short id of the daemon's instance.
    pub daemon_id: String,
    /// The directory whose entries are the guests' state directories, named by instance id. Every directory above it
    /// may stay closed to others: QEMU opens nothing in it.
    pub guests_dir: PathBuf,
}

/// Runs virtual machines.
#[derive(Clone)]
pub struct QemuDriver {
    pub(crate) shared: Arc<Shared>,
}

pub(crate) struct Shared {
    options: QemuOptions,
    cgroups: Arc<Cgroups>,
    guests: Mutex<HashMap<InstanceId, Arc<Slot>>>,
    /// Guests whose keepers do not answer.
    silence: Arc<Silence>,
    events: Arc<Mutex<Option<mpsc::Sender<Observed>>>>,
    /// Events of QEMU's monitors, for who follows them.
    heard: broadcast::Sender<MonitorEvent>,
    /// Thresholds of disks that were reached, for who waits for them.
    reached: broadcast::Sender<ThresholdReached>,
    /// What happens in machines, for who hears of it.
    news: broadcast::Sender<MachineNews>,
}

#[derive(Default)]
pub(crate) struct Slot {
    /// One start, adoption or destroy at a time.
    pub(crate) changing: tokio::sync::Mutex<()>,
    machine: Mutex<Option<Arc<Machine>>>,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

fn not_running() -> Error {
    Error::not_found("the guest is not running")
}

impl QemuDriver {
    /// Makes one; touches nothing until it is asked to.
    ///
    /// # Errors
    /// Unsupported when this host has no control groups.
    pub fn new(options: QemuOptions) -> Result<Self> {
        Ok(Self {
            shared: Arc::new(Shared {
                options,
                cgroups: Arc::new(Cgroups::detect()?),
                guests: Mutex::default(),
                silence: Arc::default(),
                events: Arc::default(),
                heard: broadcast::channel(HEARD).0,
                reached: broadcast::channel(HEARD).0,
                news: broadcast::channel(HEARD).0,
            }),
        })
    }
}

impl Shared {
    pub(crate) fn dir(&self, instance: InstanceId) -> PathBuf {
        self.options.guests_dir.join(instance.to_string())
    }

    pub(crate) fn slot(&self, instance: InstanceId) -> Arc<Slot> {
        lock(&self.guests).entry(instance).or_default().clone()
    }

    /// The machine that is held and has not ended; not one whose owner broke off.
    fn held(&self, instance: InstanceId) -> Option<Arc<Machine>> {
        let slot = lock(&self.guests).get(&instance).cloned()?;
        let machine = lock(&slot.machine).clone()?;
        (machine.now().state != RuntimeState::Stopped && machine.is_owned()).then_some(machine)
    }

    /// The machine, adopted when its keeper lives and nobody holds it yet.
    pub(crate) async fn machine(&self, instance: InstanceId) -> Result<Arc<Machine>> {
        if let Some(m) = self.held(instance) {
            return Ok(m);
        }
        let dir = self.dir(instance);
        if !keeper::is_alive(&dir) {
            return Err(not_running());
        }
        let slot = self.slot(instance);
        let _changing = slot.changing.lock().await;
        self.adopt_one(&slot, &dir).await?.ok_or_else(not_running)
    }

    fn tell(&self) -> Tell {
        let events = self.events.clone();
        Arc::new(move |observed| {
            if let Some(sender) = lock(&events).as_ref()
                && sender.try_send(observed).is_err()
            {
                tracing::warn!("an event of a guest was dropped: nobody receives them");
            }
        })
    }

    fn own(&self, dir: &Path, record: Record, keeper: Keeper, observed: Observed) -> Arc<Machine> {
        let (cgroups, silence) = (self.cgroups.clone(), self.silence.clone());
        let tell = Tells {
            changed: self.tell(),
            heard: self.heard.clone(),
            reached: self.reached.clone(),
            news: self.news.clone(),
        };
        own(dir.to_owned(), record, keeper, observed, cgroups, silence, tell)
    }

    fn observed(record: &Record, state: RuntimeState, status: Option<&Status>) -> Observed {
        Observed {
            instance: record.instance,
            generation: record.generation,
            state,
            pid: status.and_then(|s| s.pid),
            domain_id: Some(record.domain_id),
            started_at: status.map(|s| s.started_at),
            exit: None,
            halt: None,
            applied_spec_version: record.spec_version,
            accelerator: Some(record.accelerator.as_str().to_owned()),
        }
    }

    /// The caller holds `changing`.
    async fn adopt_one(&self, slot: &Slot, dir: &Path) -> Result<Option<Arc<Machine>>> {
        let Some(record) = Record::read(dir)? else {
            return Ok(None);
        };
        if let Some(m) = self.held(record.instance) {
            return Ok(Some(m));
        }
        let (keeper, status) = match self.silence.connect(record.instance, dir).await {
            Err(e) if e.is(ErrorKind::NotFound) => return Ok(None),
            other => other?,
        };
        // A QEMU that does not answer for the moment still runs; its owner goes on asking.
        let mut halt = None;
        let state = match Self::run_state(dir, Duration::from_secs(2)).await {
            Ok(s) => seen(&s, &record),
            // It has ended, and who should say so is silent.
            Err(_) if status.pid.is_some_and(keeper::has_ended) => {
                let detail = "QEMU has ended and its keeper does not answer; stop it by force".into();
                halt = Some(HaltReason::Unknown { detail });
                RuntimeState::Error
            }
            Err(e) => {
                tracing::warn!(instance = %record.instance, error = %e, context = e.context, "QEMU of an adopted guest does not answer");
                RuntimeState::Running
            }
        };
        let observed = Observed { halt, ..Self::observed(&record, state, Some(&status)) };
        let machine = self.own(dir, record, keeper, observed);
        still::adopted(&machine);
        copies::adopted(&machine);
        *lock(&slot.machine) = Some(machine.clone());
        Ok(Some(machine))
    }

    /// Owns a guest again if its keeper lives, else clears up after it; answers what it does if it runs.
    async fn take_over(&self, instance: InstanceId) -> Result<Option<Observed>> {
        let (slot, dir) = (self.slot(instance), self.dir(instance));
        let _changing = slot.changing.lock().await;
        if keeper::is_alive(&dir)
            && let Some(machine) = self.adopt_one(&slot, &dir).await?
        {
            return Ok(Some(machine.now()));
        }
        let Some(record) = Record::read(&dir)? else { return Ok(None) };
        // It ended while nobody watched.
        launch::remove_sockets(&dir);
        keeper::wait_gone(&dir).await?;
        tpm::end(&dir).await?;
        virtiofs::end(&dir).await?;
        launch::drop_links(&record)?;
        Groups::of(&record.daemon_id, record.instance).remove(&self.cgroups).await?;
        Ok(None)
    }

    /// As [`Self::take_over`], until it is done.
    async fn take_over_later(weak: Weak<Self>, instance: InstanceId) {
        let mut wait = silence::BACK_OFF.0;
        loop {
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(silence::BACK_OFF.1);
            let Some(shared) = weak.upgrade() else { return };
            match shared.take_over(instance).await {
                Ok(now) => {
                    tracing::info!(%instance, runs = now.is_some(), "a guest is adopted after all");
                    return now.into_iter().for_each(|now| (shared.tell())(now));
                }
                Err(e) => tracing::debug!(%instance, error = %e, "a guest still cannot be adopted"),
            }
        }
    }

    /// QEMU's own word for what it does.
    async fn run_state(dir: &Path, limit: Duration) -> Result<String> {
        let (qmp, _) = Qmp::connect(dir, launch::QMP, limit).await?;
        let status = qmp.execute("query-status", json!({})).await?;
        Ok(status.get("status").and_then(Value::as_str).unwrap_or_default().to_owned())
    }

    /// What is known of a guest that does not run.
    fn stopped(&self, instance: InstanceId) -> Result<Observed> {
        let dir = self.dir(instance);
        let Some(record) = Record::read(&dir)? else {
            return Ok(Observed::never_ran(instance, Default::default()));
        };
        let exit = record.exit.clone().or_else(|| {
            let status = keeper::read_status(&dir)
                .filter(|s| s.generation == (record.generation.incarnation, record.generation.n))?;
            let end = match status.state {
                State::Exited | State::Failed => End::Exited(status),
                _ => End::KeeperLost(Some(status)),
            };
            Some(exit_reason(None, &end, &record))
        });
        Ok(Observed { exit, ..Self::observed(&record, RuntimeState::Stopped, None) })
    }

    /// Waits for the owner of an ended machine, so that nothing of it is removed later under a new one. The caller holds
    /// `changing`.
    async fn settle(&self, slot: &Slot) {
        let old = lock(&slot.machine).take();
        if let Some(old) = old
            && let Err(e) = old.ended().await
        {
            tracing::warn!(error = %e, context = e.context, "nobody saw the end of a guest");
        }
    }

    async fn start(&self, guest: &ResolvedGuest) -> Result<Observed> {
        let dir = &guest.state_dir;
        if *dir != self.dir(guest.instance) || guest.daemon_id != self.options.daemon_id {
            return Err(Error::internal(
                "the guest could not be started",
                format!("state directory {} or daemon is not this driver's", dir.display()),
            ));
        }
        let slot = self.slot(guest.instance);
        let _changing = slot.changing.lock().await;
        if keeper::is_alive(dir)
            && let Some(machine) = self.adopt_one(&slot, dir).await?
        {
            if machine.record().generation != guest.generation {
                return Err(Error::conflict("the guest already runs, of another start"));
            }
            let (now, resuming) = (machine.now(), machine.record().resuming);
            // An earlier call broke off before the first instruction: begun again, unless only that is missing.
            let again = match now.state {
                RuntimeState::Starting => true,
                RuntimeState::Paused if resuming && saved::there(&saved::place(dir)) => true,
                // A file of the host stays: it begins anew from there.
                RuntimeState::Paused if resuming && machine.record().from_file => true,
                RuntimeState::Paused if resuming => {
                    self.resumed(&machine).await?;
                    return Ok(machine.now());
                }
                _ => return Ok(now),
            };
            if again {
                self.force(&machine).await?;
            }
        }
        self.settle(&slot).await;
        let groups = Groups::of(&guest.daemon_id, guest.instance);
        // Of a guest whose keeper was killed while nobody watched.
        groups.remove(&self.cgroups).await?;
        if guest.accelerator == AcceleratorKind::Kvm {
            let found = probe::accelerator();
            if found.kind != AcceleratorKind::Kvm {
                return Err(Error::unsupported(format!(
                    "KVM was asked for and cannot be used: {}",
                    found.reason
                )));
            }
        }
        let mut record = Record::new(guest);
        record.placed = Placed::of(guest, record.memory, record.cpus);
        record.virtiofs = virtiofs::choose(guest, &record.directories).await?;
        record.spice = guest.machine.as_ref().is_some_and(|m| m.spice && m.display) && probe::spice();
        let paused = guest.machine.as_ref().is_some_and(|m| m.paused);
        monitor::unmark(dir)?;
        // Whoever orders a start knows by now which of a disk and its copy counts.
        copies::clear(dir)?;
        backups::clear(dir)?;
        memory_files::clear(dir)?;
        record.from_file = guest.memory.is_some();
        if let Some(memory) = &guest.memory {
            record.resuming = true;
            saved::demand_words_fit(&memory.shape, guest.limits.memory_share, &mut record)?;
        } else if record.resuming {
            saved::demand_fit(&saved::place(dir), guest.limits.memory_share, &mut record)?;
        } else {
            saved::discard(dir)?;
        }
        match self.start_new(guest, &groups, &record).await {
            Ok((keeper, status)) => {
                let state = if paused { RuntimeState::Paused } else { RuntimeState::Running };
                let observed = Self::observed(&record, state, Some(&status));
                // Before its owner asks QEMU.
                record.held = paused;
                let machine = self.own(dir, record, keeper, observed.clone());
                *lock(&slot.machine) = Some(machine.clone());
                still::adopted(&machine);
                if machine.record().resuming || paused {
                    {
                        let mut record = machine.record();
                        record.resuming = false;
                        record.write(dir)?;
                    }
                    // QEMU has it now, be it that the machine goes on or not.
                    saved::discard(dir)?;
                }
                Ok(observed)
            }
            Err(e) => {
                launch::remove_sockets(dir);
                keeper::wait_gone(dir).await?;
                tpm::end(dir).await?;
                virtiofs::end(dir).await?;
                launch::drop_links(&record)?;
                groups.remove(&self.cgroups).await?;
                Err(e)
            }
        }
    }

    async fn start_new(
        &self,
        guest: &ResolvedGuest,
        groups: &Groups,
        record: &Record,
    ) -> Result<(Keeper, Status)> {
        let dir = &guest.state_dir;
        if guest.nics.iter().any(|n| n.bridge().is_none()) {
            // Its interface outlives QEMU: it is known before it is made.
            record.write(dir)?;
        }
        let (mut spec, mut fds) = {
            let (guest, groups, cgroups) = (guest.clone(), groups.clone(), self.cgroups.clone());
            let record = record.clone();
            tokio::task::spawn_blocking(move || prepare(&guest, &record, &groups, &cgroups))
                .await
                .map_err(|e| Error::internal("the guest could not be started", e))??
        };
        record.write(dir)?;
        // Memory that was kept may be that of a guest whose file systems are still.
        if !record.resuming {
            still::clear(dir)?;
        }
        if guest.machine.as_ref().is_some_and(|m| m.tpm) {
            fds.push(tpm::start(guest, groups, &self.cgroups).await?);
            spec.fds.push(crate::argv::fd::TPM);
        } else {
            tpm::forget(dir).await?;
        }
        for (number, connection) in virtiofs::start(guest, groups, &self.cgroups, record).await? {
            fds.push(connection);
            spec.fds.push(number);
        }
        let keeper = keeper::launch(dir, &spec, fds).await?;
        let paused = guest.machine.as_ref().is_some_and(|m| m.paused);
        let greeted = async {
            if launch::hold(guest) {
                let (qmp, _) = Qmp::connect(dir, launch::QMP, GREETING).await?;
                match &guest.memory {
                    Some(memory) => saved::load_from(&qmp, &*memory.file.0).await?,
                    None if record.resuming => saved::load(&qmp, &saved::place(dir)).await?,
                    None => {}
                }
                plug::before_first(&qmp, guest).await?;
                resize::before_first(&qmp, record).await?;
                self.place(&qmp, &keeper, guest, groups, &record.placed).await?;
                if !paused {
                    saved::discard(dir)?;
                    qmp.execute("cont", json!({})).await?;
                }
            }
            match Self::run_state(dir, GREETING).await?.as_str() {
                "running" if !paused => Ok(()),
                "prelaunch" | "paused" if paused => Ok(()),
                other => Err(Error::internal("the virtual machine did not begin to run", other)),
            }
        };
        let failure = tokio::select! {
            greeted = greeted => match greeted {
                Ok(()) => {
                    let status = keeper.status().await?;
                    return Ok((keeper, status));
                }
                Err(e) => e,
            },
            _ = keeper.wait_exit() => Error::unavailable("QEMU ended while it started"),
        };
        // When QEMU gave up by itself its last words say more than the silence of its socket.
        let end = match timeout(Duration::from_secs(2), keeper.wait_exit()).await {
            Ok(end) => end?,
            Err(_) => {
                let _ = keeper.kill().await;
                let _ = timeout(FORCE, keeper.wait_exit()).await;
                return Err(failure);
            }
        };
        if let Some(failure) = virtiofs::explain(dir, record).await {
            return Err(failure);
        }
        Err(match end.status() {
            Some(s) => explain(&s.output, record),
            None => failure,
        })
    }

    /// Puts the threads of a QEMU that begins where they are pinned.
    async fn place(
        &self,
        qmp: &Qmp,
        keeper: &Keeper,
        guest: &ResolvedGuest,
        groups: &Groups,
        placed: &Placed,
    ) -> Result<()> {
        let pins = &guest.limits.pins;
        if pins.is_empty() {
            return Ok(());
        }
        let pid = keeper.status().await?.pid;
        let pid = pid.ok_or_else(|| Error::unavailable("QEMU ended while it started"))?;
        let all = threads::cpus(&limits(guest, placed)?, &self.cgroups, &groups.machine);
        threads::place(qmp, pid, pins, &all).await
    }

    /// The last steps of a start from memory whose caller was lost.
    async fn resumed(&self, machine: &Machine) -> Result<()> {
        machine.ask(Ask::Resume).await?;
        let mut record = machine.record();
        record.resuming = false;
        record.write(&machine.dir)
    }

    /// Keeps the memory and ends the machine. When that fails, or nobody waits for it any more, it runs on, if it ran.
    async fn save(self: &Arc<Self>, machine: &Arc<Machine>) -> Result<()> {
        let (shared, machine) = (self.clone(), machine.clone());
        // Whoever is dropped drops this, which the task sees: QEMU is not left with a machine that stands still for nobody.
        let (waits, mut gone) = tokio::sync::oneshot::channel::<()>();
        let work = tokio::spawn(async move {
            let slot = shared.slot(machine.record().instance);
            let _changing = slot.changing.lock().await;
            copies::demand_none(&machine).await?;
            backups::demand_none(&machine).await?;
            let stopping = memory_files::begin_stop(&machine).await?;
            let written = async {
                machine.ask(Ask::Pause).await?;
                stopping.asked(&machine).await?;
                saved::save(&machine, &saved::place(&machine.dir)).await
            };
            let written = tokio::select! {
                biased;
                _ = &mut gone => Err(Error::new(ErrorKind::Cancelled, "nobody waits for the memory any more")),
                written = written => written,
            };
            if let Err(e) = written {
                stopping.broken_off(&machine).await?;
                return Err(e);
            }
            // The last moment at which it can go on.
            if matches!(gone.try_recv(), Err(tokio::sync::oneshot::error::TryRecvError::Closed)) {
                stopping.broken_off(&machine).await?;
                return Err(Error::new(ErrorKind::Cancelled, "nobody waits for the memory any more"));
            }
            memory_files::clear(&machine.dir)?;
            shared.force(&machine).await
        });
        let saved = work.await.map_err(|e| Error::internal("the memory could not be kept", e))?;
        drop(waits);
        saved
    }

    async fn force(&self, machine: &Machine) -> Result<()> {
        let instance = machine.record().instance;
        let killed = async {
            if self.silence.contains(instance) {
                return Err(Error::timeout("the guest's keeper does not answer"));
            }
            {
                let _telling = machine.telling.lock().await;
                machine.keeper.mark(Requested::Force).await?;
            }
            // What has changed since checkpoints is in its files only when QEMU ends by itself.
            let wrote = async {
                bitmaps::quit(machine).await?;
                machine.ended().await
            };
            if matches!(timeout(WRITE, wrote).await, Ok(Ok(_))) {
                return Ok(());
            }
            machine.keeper.kill().await
        };
        match killed.await {
            // Ended at this moment.
            Err(e) if e.is(ErrorKind::NotFound) => {}
            // A keeper that does not answer is itself killed, and QEMU with it.
            Err(e) => {
                tracing::warn!(%instance, error = %e, "ending a guest with its keeper");
                keeper::end_keeper(&machine.dir)?;
                self.silence.forget(instance);
            }
            Ok(()) => {}
        }
        timeout(FORCE, machine.ended()).await.map_err(|_| Error::timeout("QEMU does not end"))?.map(drop)
    }

    /// What goes on inside a machine that can answer: one whose CPUs stand still cannot.
    async fn inside(&self, instance: InstanceId) -> Result<(Arc<Machine>, Arc<Inside>)> {
        let machine = self.machine(instance).await?;
        match machine.now().state {
            RuntimeState::Paused => Err(Error::conflict("the guest is frozen; resume it first")),
            RuntimeState::Error => {
                Err(Error::conflict("the guest is halted by an error; resume it or force it to stop"))
            }
            _ => {
                let inside = machine.inside.clone();
                Ok((machine, inside))
            }
        }
    }

    async fn interfaces(machine: &Machine) -> BTreeMap<String, Interface> {
        let nics = machine.record().nics.clone();
        let host = |mac: &str| {
            nics.iter().find(|n| n.mac.eq_ignore_ascii_case(mac)).map(|n| n.host_interface.clone())
        };
        machine.inside.interfaces(host).await
    }
}

/// Limits of a machine that runs with so much memory, be it that a part of it is the balloon's: what would be its end waits.
fn live_limits(guest: &ResolvedGuest, memory: u64, placed: &Placed) -> Result<(CgroupLimits, Vec<String>)> {
    let mut limits = limits(guest, placed)?;
    let least = memory.saturating_add(BESIDE.bytes());
    if limits.memory.is_some_and(|hard| hard < least) {
        limits.memory = Some(least);
        return Ok((limits, vec!["limits.memory.hard".to_owned()]));
    }
    Ok((limits, vec![]))
}

/// Work on files, which may take long.
async fn files<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::internal("files of the guest", e))?
}

#[async_trait]
impl GuestDriver for QemuDriver {
    fn kind(&self) -> InstanceKind {
        InstanceKind::VirtualMachine
    }

    async fn start(&self, guest: &ResolvedGuest) -> Result<Observed> {
        self.shared.start(guest).await
    }

    async fn stop(&self, instance: InstanceId, mode: StopMode) -> Result<Observed> {
        let machine = match self.shared.machine(instance).await {
            Err(e) if e.is(ErrorKind::NotFound) => return self.observe(instance).await,
            other => other?,
        };
        let stopped = match mode {
            StopMode::Graceful { timeout } => machine.ask(Ask::Graceful(timeout)).await,
            StopMode::Force => self.shared.force(&machine).await,
            StopMode::Save => self.shared.save(&machine).await,
        };
        match stopped {
            // It ended by itself meanwhile.
            Err(e) if !e.is(ErrorKind::NotFound) => Err(e),
            _ => machine.ended().await,
        }
    }

    async fn ask(&self, instance: InstanceId, wish: GuestWish, by: AskedBy) -> Result<()> {
        let anew = wish == GuestWish::Reboot;
        if by == AskedBy::Agent {
            return self.shared.inside(instance).await?.1.ask(anew).await;
        }
        let machine = self.shared.machine(instance).await?;
        // An agent whose processors stand still would be waited for.
        let answers = matches!(machine.now().state, RuntimeState::Running | RuntimeState::Stopping);
        if by == AskedBy::Any && answers {
            if !anew {
                // Beside the button, and not waited for.
                drop(machine.inside.shut_down());
            } else if machine.inside.ask(true).await.is_ok() {
                return Ok(());
            }
        }
        machine.ask(Ask::Press { anew }).await
    }

    async fn pause(&self, instance: InstanceId) -> Result<Observed> {
        let machine = self.shared.machine(instance).await?;
        machine.ask(Ask::Hold).await?;
        Ok(machine.now())
    }

    async fn resume(&self, instance: InstanceId) -> Result<Observed> {
        let machine = self.shared.machine(instance).await?;
        machine.ask(Ask::Resume).await?;
        machine.inside.set_time_soon();
        Ok(machine.now())
    }

    async fn update(&self, guest: &ResolvedGuest) -> Result<Applied> {
        let machine = self.shared.machine(guest.instance).await?;
        let slot = self.shared.slot(guest.instance);
        let _changing = slot.changing.lock().await;
        let groups = Groups::of(&guest.daemon_id, guest.instance);
        let (memory, placed) = {
            let record = machine.record();
            (record.memory, record.placed.clone())
        };
        let (limits, mut pending) = live_limits(guest, memory, &placed)?;
        let cpus = threads::cpus(&limits, &self.shared.cgroups, &groups.machine);
        threads::demand(&guest.limits.pins, &cpus)?;
        let new = Record::new(guest);
        let served = machine.record().virtiofs.clone();
        virtiofs::demand(guest, &new.directories, &served).await?;
        self.shared.cgroups.limit(&groups.machine, &limits)?;
        let iothreads = guest.machine.as_ref().map_or(&[][..], |m| &m.iothreads);
        threads::add(&machine, iothreads).await?;
        pending.extend(plug::apply(&machine, guest).await?);
        pending.extend(resize::apply(&machine, &new).await?);
        pending.extend(resize::room(&machine.record(), &guest.limits));
        pending.extend(threads::remove(&machine, iothreads).await?);
        threads::place_anew(&machine, &guest.limits.pins, &cpus).await?;
        let version = {
            let mut record = machine.record();
            pending.extend(record.pending(&new));
            if cpu_count(guest.limits.cpu.as_ref()) == record.cpus {
                record.cpu = new.cpu;
            }
            // Programs that start from now on see it.
            record.environment = new.environment;
            record.nics = new.nics;
            if pending.is_empty() {
                record.spec_version = new.spec_version;
            }
            record.write(&guest.state_dir)?;
            record.spec_version
        };
        machine.observed.send_modify(|o| o.applied_spec_version = version);
        Ok(Applied { pending })
    }

    async fn observe(&self, instance: InstanceId) -> Result<Observed> {
        match self.shared.machine(instance).await {
            Ok(machine) => Ok(machine.now()),
            Err(e) if e.is(ErrorKind::NotFound) => self.shared.stopped(instance),
            Err(e) => Err(e),
        }
    }

    async fn adopt(&self) -> Result<Vec<Observed>> {
        let mut adopted = vec![];
        let shared = &self.shared;
        let mut ours = vec![];
        for found in keeper::find_all(&shared.options.guests_dir)? {
            let record = match Record::read(&found.dir) {
                Ok(Some(r))
                    if r.daemon_id == shared.options.daemon_id && shared.dir(r.instance) == found.dir =>
                {
                    r
                }
                Ok(_) => continue, // of another driver
                Err(e) => {
                    tracing::warn!(dir = %found.dir.display(), error = %e, "a guest's record cannot be read");
                    continue;
                }
            };
            ours.push(record.instance);
        }
        // Side by side, so that those whose keepers do not answer take no longer than one.
        let each = ours.into_iter().map(|id| async move { (id, shared.take_over(id).await) });
        for (instance, outcome) in futures::future::join_all(each).await {
            match outcome {
                Ok(now) => adopted.extend(now),
                Err(e) => {
                    tracing::error!(%instance, error = %e, context = e.context, "a guest cannot be adopted now; it is tried again");
                    tokio::spawn(Shared::take_over_later(Arc::downgrade(shared), instance));
                }
            }
        }
        Ok(adopted)
    }

    async fn destroy(&self, instance: InstanceId) -> Result<()> {
        let shared = &self.shared;
        let slot = shared.slot(instance);
        let _changing = slot.changing.lock().await;
        let dir = shared.dir(instance);
        if keeper::is_alive(&dir) {
            return Err(Error::conflict("the guest is running; stop it first"));
        }
        shared.settle(&slot).await;
        keeper::wait_gone(&dir).await?;
        tpm::end(&dir).await?;
        virtiofs::end(&dir).await?;
        if let Some(record) = Record::read(&dir)? {
            launch::drop_links(&record)?;
        }
        Groups::of(&shared.options.daemon_id, instance).remove(&shared.cgroups).await?;
        match tokio::fs::remove_dir_all(&dir).await {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
            _ => {}
        }
        lock(&shared.guests).remove(&instance);
        Ok(())
    }

    async fn sample(&self, instance: InstanceId, detailed: bool) -> Result<Metrics> {
        let machine = self.shared.machine(instance).await?;
        let (groups, memory_total) = {
            let record = machine.record();
            (Groups::of(&record.daemon_id, instance), record.balloon.unwrap_or(record.memory))
        };
        let pid = machine.observed.borrow().pid;
        let counted = machine.sampled.counted(&self.shared.cgroups, &groups.machine, pid);
        // One whose CPUs stand still would only be waited for.
        let answers = matches!(machine.now().state, RuntimeState::Running | RuntimeState::Stopping);
        let (interfaces, (figures, system)) = match answers {
            true => tokio::join!(Shared::interfaces(&machine), machine.inside.system()),
            false => Default::default(),
        };
        let processes = figures.as_ref().map(|f| f.processes);
        let details = match (detailed, figures) {
            (false, _) => None,
            (true, Some(figures)) => Some(details::of_guest(figures)),
            (true, None) => Some(details::of_host(&machine, memory_total, counted.memory).await),
        };
        Ok(Metrics {
            cpu_ns: counted.cpu_ns,
            memory: counted.memory,
            memory_peak: counted.memory_peak,
            swap: counted.swap,
            memory_total: Some(memory_total),
            processes,
            disk_read: counted.disk_read,
            disk_written: counted.disk_written,
            interfaces,
            system,
            sampled_at: None,
            details: details.map(Box::new),
        })
    }

    async fn exec(&self, instance: InstanceId, request: ExecRequest) -> Result<Exec> {
        let (machine, inside) = self.shared.inside(instance).await?;
        let environment = machine.record().environment.clone();
        inside.exec(&environment, request).await
    }

    async fn console(&self, instance: InstanceId, force: bool) -> Result<OwnedFd> {
        self.shared.machine(instance).await?.keeper.attach(force).await
    }

    async fn runner_log(&self, instance: InstanceId, max: usize, _: bool) -> Result<Vec<u8>> {
        // The keeper has the end of it, and writes it with its status.
        let output = keeper::read_status(&self.shared.dir(instance)).map(|s| s.output).unwrap_or_default();
        let start = output.len().saturating_sub(max);
        Ok(output.as_bytes()[start..].to_vec())
    }

    async fn console_log(&self, instance: InstanceId, max: usize, clear: bool) -> Result<Vec<u8>> {
        let dir = self.shared.dir(instance);
        let log = keeper::console_log(&dir, max)?;
        if clear {
            keeper::clear_console_log(&dir).await?;
        }
        Ok(log)
    }

    fn files(&self) -> Option<&dyn GuestFiles> {
        Some(self)
    }

    fn machine(&self) -> Option<&dyn GuestMachine> {
        Some(self)
    }

    fn disk_backups(&self) -> Option<&dyn DiskBackups> {
        Some(self)
    }

    fn disk_copies(&self) -> Option<&dyn DiskCopies> {
        Some(self)
    }

    fn disk_merges(&self) -> Option<&dyn DiskMerges> {
        Some(self)
    }

    fn memory_files(&self) -> Option<&dyn MemoryFiles> {
        Some(self)
    }

    fn quiesce(&self) -> Option<&dyn Quiesce> {
        Some(self)
    }

    fn warnings(&self) -> Vec<String> {
        let mut all = self.shared.silence.warnings();
        let slots: Vec<Arc<Slot>> = lock(&self.shared.guests).values().cloned().collect();
        for machine in slots.iter().filter_map(|slot| lock(&slot.machine).clone()) {
            if machine.now().state != RuntimeState::Stopped {
                all.extend(virtiofs::warnings(&machine));
            }
        }
        all
    }

    fn events(&self) -> mpsc::Receiver<Observed> {
        let (sender, receiver) = mpsc::channel(1024);
        *lock(&self.shared.events) = Some(sender);
        receiver
    }
}
