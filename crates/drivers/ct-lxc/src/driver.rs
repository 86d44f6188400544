//! The driver.

use crate::{
    attach,
    balance::{self, Balancer},
    config::{Groups, HostFeatures},
    disks,
    end::{ended, exit_reason},
    guest_api,
    limits::{Place, limits},
    locks,
    proc::{Init, init_end},
    record::Record,
};
use async_trait::async_trait;
use karst_guest::{
    Applied, AskedBy, Exec, ExecRequest, GuestDriver, GuestFiles, GuestWish, Metrics, Observed,
    ResolvedGuest, Silence, StopMode,
    keeper::{self, Keeper, Requested, Status},
};
use karst_host::{Program, cgroup::Cgroups, overlay::Held, run};
use karst_model::{
    Error, ErrorKind, InstanceId, Result,
    instance::{ExitReason, HaltReason, InstanceKind, RuntimeState},
};
use std::{
    collections::{BTreeMap, HashMap},
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};
use tokio::sync::mpsc;

mod adopting;
mod asking;
mod beside;
mod clearing;
mod network;
mod sampling;
mod starting;
mod watching;

/// How long a killed container may take to be gone.
const FORCE: Duration = Duration::from_secs(20);

/// What the driver is made with.
#[derive(Debug, Clone)]
pub struct LxcOptions {
    /// Short id of the daemon's instance.
    pub daemon_id: String,
    /// The directory whose entries are the guests' state directories, named by instance id.
    pub guests_dir: PathBuf,
}

/// Runs containers.
#[derive(Clone)]
pub struct LxcDriver {
    shared: Arc<Shared>,
}

struct Shared {
    options: LxcOptions,
    balancer: Arc<Balancer>,
    cgroups: Arc<Cgroups>,
    host: HostFeatures,
    /// Set when the AppArmor profiles are loaded, that of privileged containers last: once by each daemon, which may be newer
    /// than the one before.
    profiles: [tokio::sync::OnceCell<()>; 2],
    guests: Mutex<HashMap<InstanceId, Arc<Guest>>>,
    /// Proxies whose sockets in their guests could not be made for long, and why.
    hidden: Mutex<BTreeMap<(InstanceId, String), String>>,
    /// Guests whose keepers do not answer.
    silence: Arc<Silence>,
    events: Mutex<Option<mpsc::Sender<Observed>>>,
}

/// What is kept in memory of a guest; all of it can be made again.
#[derive(Default)]
struct Guest {
    /// One start, destroy or clean-up at a time. Never held while waiting for a guest to follow a request.
    changing: tokio::sync::Mutex<()>,
    /// Who waits for it to shut down.
    requests: asking::Requests,
    /// What samples are made with.
    sampled: Mutex<Option<Arc<sampling::Sampled>>>,
    /// When a sample found that it does not run.
    stopped: Mutex<Option<std::time::Instant>>,
    /// Its sockets inside are looked after.
    keeping: Mutex<bool>,
    /// The keeper that a watcher watches.
    watched: Mutex<Option<u32>>,
    /// A root that is an overlay, so that its last close, which writes out the file system below, is not the container's end.
    root: Mutex<Option<Held>>,
}

/// A guest whose keeper lives.
pub(crate) struct Running {
    pub(crate) record: Record,
    dir: PathBuf,
    groups: Groups,
    cgroups: Arc<Cgroups>,
    keeper: Keeper,
    status: Status,
}

impl Running {
    /// The control groups for a program that enters.
    pub(crate) fn entry(&self) -> Result<Vec<PathBuf>> {
        self.cgroups.entry(&self.groups.inner(), ".karst")
    }

    pub(crate) fn init(&self) -> Option<Init> {
        Init::find(self.status.pid?)
    }

    /// Permits or forbids a device (`c 10:200 rwm`) to the container from now on.
    pub(crate) async fn permit_device(&self, rule: &str, permit: bool) -> Result<()> {
        if self.cgroups.permit_device(&self.groups.container(), rule, permit)? {
            return Ok(());
        }
        // On v2 it is a program in the kernel that `lxc-start` has made and replaces when it is asked to.
        let instance = self.record.instance.to_string();
        let key = if permit { "devices.allow" } else { "devices.deny" };
        let command = run(Program::LxcCgroup).args(["-n", &instance, "-P"]).arg(&self.dir);
        let out = command.args([key, rule]).output().await?;
        if out.code == 0 {
            return Ok(());
        }
        Err(Error::internal("the device could not be permitted", String::from_utf8_lossy(&out.stderr)))
    }

    /// Process id of `lxc-start`.
    pub(crate) fn monitor(&self) -> Result<u32> {
        self.status.pid.ok_or_else(not_running)
    }
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

fn not_running() -> Error {
    Error::not_found("the guest is not running")
}

impl LxcDriver {
    /// Makes one; touches nothing until it is asked to.
    ///
    /// # Errors
    /// Unsupported when this host has no control groups.
    pub fn new(options: LxcOptions) -> Result<Self> {
        let cgroups = Cgroups::detect()?;
        let host = HostFeatures::detect(cgroups.is_unified());
        let cgroups = Arc::new(cgroups);
        let (guests_dir, daemon_id) = (options.guests_dir.clone(), options.daemon_id.clone());
        Ok(Self {
            shared: Arc::new(Shared {
                options,
                host,
                profiles: Default::default(),
                balancer: Balancer::new(cgroups.clone(), guests_dir, daemon_id),
                cgroups,
                guests: Mutex::default(),
                hidden: Mutex::default(),
                silence: Arc::default(),
                events: Mutex::default(),
            }),
        })
    }

    pub(crate) fn daemon_id(&self) -> &str {
        &self.shared.options.daemon_id
    }

    /// The running guest and its init.
    pub(crate) async fn init(&self, instance: InstanceId) -> Result<(Running, Init)> {
        let running = self.shared.running(instance).await?;
        match running.init() {
            Some(init) => Ok((running, init)),
            None => Err(Error::unavailable("the guest is just starting; try again")),
        }
    }
}

impl Shared {
    fn dir(&self, instance: InstanceId) -> PathBuf {
        self.options.guests_dir.join(instance.to_string())
    }

    fn guest(&self, instance: InstanceId) -> Arc<Guest> {
        lock(&self.guests).entry(instance).or_default().clone()
    }

    async fn running(&self, instance: InstanceId) -> Result<Running> {
        let dir = self.dir(instance);
        let (keeper, status) = self.silence.connect(instance, &dir).await?;
        let record = Record::read(&dir)?.ok_or_else(not_running)?;
        Ok(Running {
            dir,
            groups: Groups::of(&record.daemon_id, instance),
            record,
            cgroups: self.cgroups.clone(),
            keeper,
            status,
        })
    }

    /// What a running guest does now.
    fn observed(&self, running: &Running) -> Observed {
        let init = running.init();
        let state = match &init {
            _ if self.cgroups.is_frozen(&running.groups.limits) => RuntimeState::Paused,
            Some(_) if running.status.requested == Requested::Shutdown => RuntimeState::Stopping,
            Some(_) => RuntimeState::Running,
            // It has ended, and who should say so is silent.
            None if running.status.pid.is_some_and(keeper::has_ended) => RuntimeState::Error,
            None => RuntimeState::Starting,
        };
        let halt = (state == RuntimeState::Error).then(|| HaltReason::Unknown {
            detail: "it has ended and its keeper does not answer; stop it by force".into(),
        });
        Observed {
            state,
            halt,
            pid: init.map(|i| i.pid),
            started_at: Some(running.status.started_at),
            ..self.stopped(&running.record, None)
        }
    }

    fn stopped(&self, record: &Record, exit: Option<ExitReason>) -> Observed {
        Observed {
            instance: record.instance,
            generation: record.generation,
            state: RuntimeState::Stopped,
            pid: None,
            domain_id: Some(record.domain_id),
            started_at: None,
            exit,
            halt: None,
            applied_spec_version: record.spec_version,
            accelerator: None,
        }
    }

    async fn observe(&self, instance: InstanceId) -> Result<Observed> {
        match self.running(instance).await {
            Ok(running) => Ok(self.observed(&running)),
            Err(e) if e.is(ErrorKind::NotFound) => {
                let dir = self.dir(instance);
                Ok(match Record::read(&dir)? {
                    Some(record) => {
                        let exit = match keeper::read_status(&dir) {
                            Some(s)
                                if (s.generation.0, s.generation.1)
                                    == (record.generation.incarnation, record.generation.n) =>
                            {
                                exit_reason(&ended(s), init_end(&dir.join("lxc.log")))
                            }
                            _ => None,
                        };
                        self.stopped(&record, exit)
                    }
                    None => Observed::never_ran(instance, Default::default()),
                })
            }
            Err(e) => Err(e),
        }
    }

    fn tell(&self, observed: Observed) {
        let sender = lock(&self.events).clone();
        if let Some(sender) = sender
            && sender.try_send(observed).is_err()
        {
            tracing::warn!("an event of a guest was dropped: nobody receives them");
        }
    }
}

#[async_trait]
impl GuestDriver for LxcDriver {
    fn kind(&self) -> InstanceKind {
        InstanceKind::Container
    }

    async fn start(&self, guest: &ResolvedGuest) -> Result<Observed> {
        self.shared.start(guest).await
    }

    async fn stop(&self, instance: InstanceId, mode: StopMode) -> Result<Observed> {
        let shared = &self.shared;
        let running = match shared.running(instance).await {
            Ok(running) => running,
            Err(e) if e.is(ErrorKind::NotFound) => {
                return shared.after_end(instance, &shared.guest(instance)).await;
            }
            Err(e) => return Err(e),
        };
        let stopped = match mode {
            StopMode::Graceful { timeout } => shared.stop_graceful(&running, timeout).await,
            StopMode::Force if shared.silence.contains(instance) => shared.stop_silent(&running).await,
            StopMode::Force => match shared.stop_force(&running).await {
                Err(e) if e.is(ErrorKind::Timeout) => shared.stop_silent(&running).await,
                stopped => stopped,
            },
            StopMode::Save => Err(Error::unsupported("the memory of a container cannot be kept")),
        };
        match stopped {
            // It ended by itself meanwhile.
            Err(e) if !e.is(ErrorKind::NotFound) => Err(e),
            _ => shared.after_end(instance, &shared.guest(instance)).await,
        }
    }

    async fn ask(&self, instance: InstanceId, wish: GuestWish, by: AskedBy) -> Result<()> {
        self.shared.ask(instance, wish, by).await
    }

    async fn pause(&self, instance: InstanceId) -> Result<Observed> {
        let running = self.shared.running(instance).await?;
        self.shared.cgroups.freeze(&running.groups.limits, true).await?;
        Ok(self.shared.observed(&running))
    }

    async fn resume(&self, instance: InstanceId) -> Result<Observed> {
        let running = self.shared.running(instance).await?;
        self.shared.cgroups.freeze(&running.groups.limits, false).await?;
        Ok(self.shared.observed(&running))
    }

    async fn update(&self, guest: &ResolvedGuest) -> Result<Applied> {
        let kept = self.shared.guest(guest.instance);
        let _changing = kept.changing.lock().await;
        let running = self.shared.running(guest.instance).await?;
        let (cgroups, group) = (&self.shared.cgroups, &running.groups.limits);
        let place = Place::of(&guest.limits)?;
        let mut limits = limits(guest, &place);
        balance::keep(&place, &mut limits.cpus, cgroups, group);
        cgroups.limit(group, &limits)?;
        balance::note(&guest.state_dir, &place)?;
        self.shared.balancer.wake();
        // Read again: another change may have ended while this one waited for its turn.
        let mut record = Record::read(&guest.state_dir)?.ok_or_else(not_running)?;
        let new = Record::new(guest);
        // Users are what they were when it started.
        let mut guest = guest.clone();
        guest.security.privileged = record.privileged;
        let guest = &guest;
        let find =
            || running.init().ok_or_else(|| Error::unavailable("the guest is just starting; try again"));
        disks::update(&running, find, guest, &mut record).await?;
        self.shared.update_proxies(&running, &guest.proxies, &mut record).await?;
        self.shared.keep_sockets(guest.instance);
        network::update(&running, guest, &mut record).await?;
        let old = &mut record;
        let mut pending = vec![];
        if old.free_rates && !limits.io.is_empty() {
            pending.push("devices".to_owned());
        }
        if old.nesting != new.nesting {
            pending.push("security.nesting".to_owned());
        }
        if old.privileged != new.privileged {
            pending.push("security.privileged".to_owned());
        }
        if guest.security.idmap_size.unwrap_or(65_536) != old.ids.count {
            pending.push("security.idmap.size".to_owned());
        }
        if guest.security.idmap_base.is_some_and(|base| base != old.ids.base) {
            pending.push("security.idmap.base".to_owned());
        }
        pending.extend(old.fixed.differ(&new.fixed));
        match &guest.security.guest_api {
            Some(api) if old.guest_api => guest_api::write(guest, api)?,
            api if api.is_some() != old.guest_api => pending.push("security.guestapi".to_owned()),
            _ => {}
        }
        // Programs that enter from now on see it; init does not.
        old.environment = new.environment;
        if pending.is_empty() {
            old.spec_version = new.spec_version;
        }
        old.write(&guest.state_dir)?;
        *lock(&kept.sampled) = None;
        Ok(Applied { pending })
    }

    async fn observe(&self, instance: InstanceId) -> Result<Observed> {
        self.shared.observe(instance).await
    }

    async fn adopt(&self) -> Result<Vec<Observed>> {
        self.shared.balancer.wake();
        let mut adopted = vec![];
        let options = &self.shared.options;
        let mut ours = vec![];
        for found in keeper::find_all(&options.guests_dir)? {
            let record = match Record::read(&found.dir) {
                Ok(Some(r))
                    if r.daemon_id == options.daemon_id && self.shared.dir(r.instance) == found.dir =>
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
        let each = ours.into_iter().map(|id| async move { (id, self.shared.adopt_one(id).await) });
        for (instance, outcome) in futures::future::join_all(each).await {
            match outcome {
                Ok(now) => adopted.extend(now),
                Err(e) => {
                    tracing::error!(%instance, error = %e, context = e.context, "a guest cannot be adopted now; it is tried again");
                    tokio::spawn(Shared::adopt_later(Arc::downgrade(&self.shared), instance));
                }
            }
        }
        Ok(adopted)
    }

    async fn destroy(&self, instance: InstanceId) -> Result<()> {
        let kept = self.shared.guest(instance);
        let _changing = kept.changing.lock().await;
        let dir = self.shared.dir(instance);
        if keeper::is_alive(&dir) {
            return Err(Error::conflict("the guest is running; stop it first"));
        }
        keeper::wait_gone(&dir).await?;
        match Record::read(&dir)? {
            Some(record) => self.shared.clear_record(&record).await?,
            None => {
                let groups = Groups::of(&self.shared.options.daemon_id, instance);
                self.shared.clear(&dir, &groups, std::iter::empty()).await?;
            }
        }
        locks::remove(&dir)?;
        match tokio::fs::remove_dir_all(&dir).await {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
            _ => {}
        }
        lock(&self.shared.guests).remove(&instance);
        Ok(())
    }

    async fn sample(&self, instance: InstanceId, detailed: bool) -> Result<Metrics> {
        self.shared.sample(instance, detailed).await
    }

    async fn exec(&self, instance: InstanceId, request: ExecRequest) -> Result<Exec> {
        let (running, init) = self.init(instance).await?;
        if self.shared.cgroups.is_frozen(&running.groups.limits) {
            return Err(Error::conflict("the guest is frozen; resume it first"));
        }
        attach::exec(&running, init, request).await
    }

    async fn console(&self, instance: InstanceId, force: bool) -> Result<OwnedFd> {
        self.shared.running(instance).await?.keeper.attach(force).await
    }

    async fn console_resize(&self, instance: InstanceId, columns: u16, rows: u16) -> Result<()> {
        self.shared.running(instance).await?.keeper.resize(columns, rows).await
    }

    async fn console_log(&self, instance: InstanceId, max: usize, clear: bool) -> Result<Vec<u8>> {
        let dir = self.shared.dir(instance);
        let log = keeper::console_log(&dir, max)?;
        if clear {
            keeper::clear_console_log(&dir).await?;
        }
        Ok(log)
    }

    async fn runner_log(&self, instance: InstanceId, max: usize, clear: bool) -> Result<Vec<u8>> {
        let path = self.shared.dir(instance).join("lxc.log");
        let read = tokio::task::spawn_blocking(move || crate::proc::runner_log(&path, max, clear));
        read.await.map_err(|e| Error::internal("reading a log was broken off", e))?
    }

    fn files(&self) -> Option<&dyn GuestFiles> {
        Some(self)
    }

    fn warnings(&self) -> Vec<String> {
        let mut all = self.shared.hidden_sockets();
        all.extend(self.shared.silence.warnings());
        all
    }

    fn events(&self) -> mpsc::Receiver<Observed> {
        let (sender, receiver) = mpsc::channel(1024);
        *lock(&self.shared.events) = Some(sender);
        receiver
    }
}
