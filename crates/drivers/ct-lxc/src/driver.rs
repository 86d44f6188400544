//! The driver.

use crate::{
    attach,
    balance::{self, Balancer},
    config::{Groups, HostFeatures, render, seccomp, seccomp_file},
    disks,
    end::{ended, exit_reason},
    guest_api,
    limits::{Place, limits},
    locks, nics,
    proc::{Init, init_end, log_reason, new_network},
    proxies,
    record::Record,
    seed,
};
use async_trait::async_trait;
use karst_guest::{
    Applied, Exec, ExecRequest, GuestDriver, GuestFiles, Metrics, Observed, ResolvedGuest, Silence, StopMode,
    keeper::{self, Console, Keeper, Requested, Spec, Status, write_private},
};
use karst_host::{Program, cgroup::Cgroups, overlay::Held, run};
use karst_model::{
    Error, ErrorKind, InstanceId, Result,
    instance::{ExitReason, InstanceKind, RuntimeState},
};
use std::{
    collections::{BTreeMap, HashMap},
    hash::{DefaultHasher, Hash, Hasher},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{sync::mpsc, time::timeout};

mod adopting;
mod asking;
mod beside;
mod clearing;
mod network;
mod sampling;

/// How long a start may take until init's program runs.
const START: Duration = Duration::from_secs(60);
/// How long an application's program may take to handle the signal that asks it to end.
const DEAF: Duration = Duration::from_secs(2);
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

/// Writes a file that is mostly the same at each start.
fn write_unless_same(path: &Path, content: &[u8]) -> Result<()> {
    if std::fs::read(path).is_ok_and(|old| old == content) {
        return Ok(());
    }
    write_private(path, content)
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
        Observed {
            state,
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
                    None => Observed {
                        instance,
                        generation: Default::default(),
                        state: RuntimeState::Stopped,
                        pid: None,
                        domain_id: None,
                        started_at: None,
                        exit: None,
                        applied_spec_version: 0,
                        accelerator: None,
                    },
                })
            }
            Err(e) => Err(e),
        }
    }

    /// Waits for a guest's end in the background, clears up after it and tells.
    fn watch(self: &Arc<Self>, instance: InstanceId, keeper: Keeper, keeper_pid: u32) {
        let guest = self.guest(instance);
        {
            let mut watched = lock(&guest.watched);
            if *watched == Some(keeper_pid) {
                return;
            }
            *watched = Some(keeper_pid);
        }
        let weak = Arc::downgrade(self);
        tokio::spawn(async move {
            let end = tokio::select! {
                end = Shared::end_of(&weak, instance, &keeper) => end,
                () = Shared::follow(&weak, instance, &guest) => return,
            };
            let Some(shared) = weak.upgrade() else {
                return;
            };
            if let Err(e) = &end {
                tracing::warn!(%instance, error = %e, context = e.context.as_deref(), "watching a guest failed");
            }
            lock(&guest.watched).take_if(|w| *w == keeper_pid);
            if matches!(end, Ok(keeper::End::KeeperLost(_))) {
                // A process that dies closes what it has open one after the other; its lock may come after its socket.
                let _ = keeper::wait_gone(&shared.dir(instance)).await; // one that does not go is looked at below
            }
            let observed = shared.after_end(instance, &guest).await;
            shared.balancer.wake();
            match observed {
                Ok(observed) => shared.tell(observed),
                Err(e) => {
                    tracing::warn!(%instance, error = %e, context = e.context.as_deref(), "clearing up after a guest")
                }
            }
        });
    }

    async fn after_end(&self, instance: InstanceId, guest: &Guest) -> Result<Observed> {
        let _changing = guest.changing.lock().await;
        // It holds the network namespace.
        *lock(&guest.sampled) = None;
        *lock(&guest.root) = None;
        let dir = self.dir(instance);
        if !keeper::is_alive(&dir)
            && let Some(record) = Record::read(&dir)?
        {
            let groups = Groups::of(&record.daemon_id, instance);
            let interfaces = record.nics.iter().map(|n| n.host_interface.as_str());
            self.clear_guest(&dir, &groups, interfaces).await?;
            network::clear(&dir, &record).await?;
            self.clear_keeper(instance, &groups);
        }
        self.observe(instance).await
    }

    fn tell(&self, observed: Observed) {
        let sender = lock(&self.events).clone();
        if let Some(sender) = sender
            && sender.try_send(observed).is_err()
        {
            tracing::warn!("an event of a guest was dropped: nobody receives them");
        }
    }

    async fn start(self: &Arc<Self>, guest: &ResolvedGuest) -> Result<Observed> {
        let dir = &guest.state_dir;
        if *dir != self.dir(guest.instance) || guest.daemon_id != self.options.daemon_id {
            return Err(Error::internal(
                "the guest could not be started",
                format!("state directory {} or daemon is not this driver's", dir.display()),
            ));
        }
        let kept = self.guest(guest.instance);
        let _changing = kept.changing.lock().await;
        let previous = Record::read(dir)?;
        if keeper::is_alive(dir) {
            if previous.as_ref().is_none_or(|r| r.generation != guest.generation) {
                return Err(Error::conflict("the guest already runs, of another start"));
            }
            let running = self.running(guest.instance).await?;
            self.watch(guest.instance, running.keeper.clone(), running.status.keeper_pid);
            return Ok(self.observed(&running));
        }
        let groups = Groups::of(&guest.daemon_id, guest.instance);
        let interfaces = guest.nics.iter().map(|n| n.host_interface.as_str());
        let before = previous.iter().flat_map(|r| &r.nics).map(|n| n.host_interface.as_str());
        self.clear(dir, &groups, interfaces.clone().chain(before)).await?;
        if let Some(previous) = &previous {
            network::clear(dir, previous).await?;
        }
        let mut record = Record::new(guest);
        for nic in &mut record.nics {
            nic.home = nic.spec.as_ref().map(nics::home).transpose()?.flatten();
        }
        record.seed = seed_hash(guest);
        let outcome = self.start_new(guest, &groups, &record, previous.as_ref()).await;
        match outcome {
            Ok(running) => {
                *lock(&kept.sampled) = None;
                if let Err(e) = self.start_proxies(&running, &running.record.proxies).await {
                    let _ = self.stop_force(&running).await;
                    keeper::wait_gone(dir).await?;
                    self.clear(dir, &groups, interfaces).await?;
                    network::clear(dir, &record).await?;
                    return Err(e);
                }
                self.watch(guest.instance, running.keeper.clone(), running.status.keeper_pid);
                Ok(self.observed(&running))
            }
            Err(e) => {
                keeper::wait_gone(dir).await?;
                *lock(&kept.root) = None;
                self.clear(dir, &groups, interfaces).await?;
                network::clear(dir, &record).await?;
                Err(e)
            }
        }
    }

    /// Follows a guest through its lives: after a reboot from inside it has another network, and control groups in which
    /// what was permitted live is not. Never answers.
    async fn follow(weak: &Weak<Self>, instance: InstanceId, guest: &Guest) {
        let mut last = None;
        loop {
            let init = match weak.upgrade() {
                Some(shared) => shared.running(instance).await.ok().and_then(|r| r.init()),
                None => return std::future::pending().await,
            };
            let Some(init) = init else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            if last.is_some_and(|pid| pid != init.pid)
                && let Some(shared) = weak.upgrade()
                && let Err(e) = shared.after_reboot(instance, guest).await
            {
                tracing::warn!(%instance, error = %e, context = e.context.as_deref(), "after a reboot from inside");
            }
            if last != Some(init.pid)
                && let Some(shared) = weak.upgrade()
            {
                shared.keep_sockets(instance);
            }
            last = Some(init.pid);
            // SAFETY: it owns the only descriptor of this number and drops it together with the registration.
            let pidfd = unsafe {
                tokio::io::unix::AsyncFd::register_with_interest(init.pidfd, tokio::io::Interest::READABLE)
            };
            match pidfd {
                Ok(pidfd) => drop(pidfd.readable().await),
                Err(_) => tokio::time::sleep(Duration::from_secs(1)).await,
            }
        }
    }

    async fn after_reboot(&self, instance: InstanceId, guest: &Guest) -> Result<()> {
        let _changing = guest.changing.lock().await;
        let running = self.running(instance).await?;
        guest_api::forget_state(&running.dir)?;
        for node in running.record.disks.iter().filter_map(|d| d.node.as_ref()) {
            running.permit_device(&node.rule(), true).await?;
        }
        network::again(&running).await?;
        if !running.record.proxies.is_empty() {
            proxies::stop_all(&running.dir).await?;
            self.start_proxies(&running, &running.record.proxies).await?;
        }
        Ok(())
    }

    async fn start_new(
        &self,
        guest: &ResolvedGuest,
        groups: &Groups,
        record: &Record,
        previous: Option<&Record>,
    ) -> Result<Running> {
        let dir = &guest.state_dir;
        let containers = lock(&self.guests).len() + 1;
        // It may have to wait for another daemon.
        let made = tokio::task::spawn_blocking(move || crate::room::make(containers)).await;
        made.map_err(|e| Error::internal("raising a limit was broken off", e))?;
        if self.host.apparmor {
            let privileged = guest.security.privileged;
            let loaded = &self.profiles[usize::from(privileged)];
            loaded.get_or_try_init(|| crate::apparmor::load(&guest.daemon_id, privileged)).await?;
        }
        let config = dir.join("lxc.conf");
        let log = dir.join("lxc.log");
        let (rendered, place) = (render(guest, self.host)?, dir.clone());
        let filter = seccomp(&guest.security.denied_calls);
        // Beside what follows: neither needs the other.
        let written = tokio::task::spawn_blocking(move || {
            write_unless_same(&place.join("lxc.conf"), rendered.as_bytes())?;
            write_unless_same(&seccomp_file(&place), filter.as_bytes())?;
            locks::prepare(&place)?;
            write_private(&place.join("lxc.log"), b"")
        });
        let first = previous.is_none_or(|p| p.seed != record.seed);
        if first || !guest.files.is_empty() {
            seed::apply(guest, previous.map(|p| p.hostname.as_str()), first).await?;
        }
        let listener =
            guest.security.guest_api.as_ref().map(|api| guest_api::prepare(guest, api)).transpose()?;
        let mut mounted = disks::wanted(guest)?;
        // Where the controller of disks' rates has a hierarchy of its own (v1), limits do not reach groups below: the
        // container has none there.
        let rates = self.cgroups.io_alone();
        let (resolved, hide) = (guest.clone(), rates.clone());
        let prepared = tokio::task::spawn_blocking(move || {
            let (namespace, root) = disks::namespace(&resolved, &mut mounted, hide.as_deref())?;
            Ok::<_, Error>((mounted, namespace, root))
        });
        let (mounted, namespace, root) =
            prepared.await.map_err(|e| Error::internal("mounting was broken off", e))??;
        *lock(&self.guest(guest.instance).root) = root;
        let place = Place::of(&guest.limits)?;
        let limits = limits(guest, &place);
        // With rates it stays ours: they hold for one group and not for those below.
        let free = rates.as_ref().filter(|_| guest.security.nesting && limits.io.is_empty());
        let record = &Record { disks: mounted, free_rates: free.is_some(), ..record.clone() };
        record.write(dir)?;
        balance::note(dir, &place)?;
        self.cgroups.create(&groups.limits)?;
        self.cgroups.limit(&groups.limits, &limits)?;
        self.balancer.wake();
        if let Some(mount) = free {
            beside::free_rates(mount, groups, guest.inside())?;
        }
        self.cgroups.delegate(&groups.limits);
        let keeper_cgroups = self.cgroups.create_tracking(&groups.keeper)?;
        written.await.map_err(|e| Error::internal("writing was broken off", e))??;

        let mut argv: Vec<std::ffi::OsString> = vec!["lxc-start".into(), "-F".into(), "-n".into()];
        argv.push(guest.instance.to_string().into());
        for (option, value) in [("-P", dir), ("-f", &config), ("-o", &log)] {
            argv.extend([option.into(), value.as_os_str().to_owned()]);
        }
        // INFO tells how init ended, which the exit code does not (`proc::init_end`).
        argv.extend(["-l".into(), "INFO".into()]);
        if let Some(application) = &guest.application {
            argv.push("--".into());
            argv.extend(application.program.command.iter().map(Into::into));
        }
        let spec = Spec {
            daemon: guest.daemon_id.clone(),
            instance: guest.instance.to_string(),
            generation: (guest.generation.incarnation, guest.generation.n),
            program: Program::LxcStart.path()?,
            argv,
            env: vec![
                // All it looks for is AppArmor's parser, in sbin. Finding `newuidmap`, which lies in bin, it would insist on
                // ranges that /etc/subuid gives to root, and ours are kept apart from all of those.
                ("PATH".into(), "/usr/sbin:/sbin".into()),
                ("LC_ALL".into(), "C.UTF-8".into()),
                ("TERM".into(), "linux".into()),
            ],
            keeper_cgroups,
            cgroups: rates.iter().map(|mount| mount.join(&groups.limits)).collect(),
            mount_namespace: true,
            console: Console::Pty,
            kill_writes: self
                .cgroups
                .freezer(&groups.limits, false)
                .map(|(file, value)| (file, value.to_owned()))
                .into_iter()
                .collect(),
            ..Spec::default()
        };
        // The server starts beside the container: until it serves, who connects waits.
        let serving = async {
            match listener {
                Some(listener) => guest_api::start(&self.place(dir, record, groups), listener).await,
                None => Ok(()),
            }
        };
        let (keeper, serving) = tokio::join!(keeper::launch(dir, &spec, vec![namespace]), serving);
        let keeper = keeper?;
        if let Err(e) = serving {
            let _ = keeper.kill().await;
            let _ = timeout(FORCE, keeper.wait_exit()).await;
            return Err(e);
        }
        let status = keeper.status().await;
        let running = |status| Running {
            dir: dir.clone(),
            record: record.clone(),
            groups: groups.clone(),
            cgroups: self.cgroups.clone(),
            keeper: keeper.clone(),
            status,
        };
        let waiting = async {
            let running = running(status?);
            let mut missing = record.nics.iter().any(|n| n.plugged);
            // Nothing tells that a process has executed its program; the set-up takes about 20 ms.
            while missing || running.init().is_none() {
                if missing && let Some((_, namespace)) = running.status.pid.and_then(new_network) {
                    network::plug(dir, record, namespace).await?;
                    missing = false;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            for nic in record.nics.iter().filter(|n| !n.plugged).filter_map(|n| n.spec.as_ref()) {
                nics::settle(nic)?;
            }
            Ok::<_, Error>(running)
        };
        let e = tokio::select! {
            started = timeout(START, waiting) => match started {
                Ok(Ok(running)) => return Ok(running),
                // Gone again already: below.
                Ok(Err(e)) if e.is(ErrorKind::NotFound) => None,
                Ok(Err(e)) => Some(e),
                Err(_) => Some(Error::timeout("the container's init did not start in time")),
            },
            _ = keeper.wait_exit() => None,
        };
        if let Some(e) = e {
            let _ = keeper.kill().await;
            let _ = timeout(FORCE, keeper.wait_exit()).await;
            return Err(e);
        }
        let output = keeper::read_status(dir).map(|s| s.output).unwrap_or_default();
        let ended = || match (&guest.application, init_end(&log)) {
            (Some(_), Some(end)) => format!("its program ended at once ({end}); its console log says more"),
            (Some(_), None) => "its program ended at once; set oci.entrypoint to one that stays".to_owned(),
            _ => "the container ended while it started".to_owned(),
        };
        let reason = log_reason(&log).unwrap_or_else(ended);
        Err(Error::new(ErrorKind::Conflict, format!("the container could not be started: {reason}"))
            .with_context(output))
    }

    async fn stop_graceful(&self, running: &Running, time: Duration) -> Result<()> {
        let Some(init) = running.init() else {
            return Err(Error::unavailable("the guest is just starting; try again, or force it"));
        };
        let asking = self.asks(running).await?;
        if self.cgroups.is_frozen(&running.groups.limits) {
            self.cgroups.freeze(&running.groups.limits, false).await?;
        }
        let chosen = running.record.fixed.program.as_ref().and_then(|p| p.stop_signal);
        let chosen = running.record.application.then(|| chosen.unwrap_or(libc::SIGTERM));
        if let Some(signal) = chosen.filter(|s| !init.minds(*s)) {
            // The kernel keeps from the first process of a container what that does not handle: it cannot be asked to end.
            // A program that has only just started may still prepare for it.
            tokio::time::sleep(DEAF.min(time)).await;
            if !init.minds(signal) {
                asking.followed();
                init.signal(rustix::process::Signal::KILL);
                return running.keeper.wait_exit().await.map(drop);
            }
        }
        let asked = AtomicBool::new(false);
        let work = async {
            // An init that has not yet installed its handler ignores the signal for good.
            let signal = loop {
                match chosen.or_else(|| init.halt_signal()) {
                    Some(signal) => break signal,
                    None if init.lives() => tokio::time::sleep(Duration::from_millis(5)).await,
                    None => return running.keeper.wait_exit().await.map(drop),
                }
            };
            init.signal_number(signal)?;
            asked.store(true, Ordering::Relaxed);
            running.keeper.wait_exit().await.map(drop)
        };
        match timeout(time, work).await {
            Ok(Err(e)) if !e.is(ErrorKind::NotFound) => Err(e),
            // Also when it was gone before it could be asked.
            Ok(_) => {
                asking.followed();
                Ok(())
            }
            Err(_) => {
                asking.take_back().await;
                Err(Error::timeout(match asked.into_inner() {
                    true => format!(
                        "the guest did not shut down within {} s; force it, or look at its console",
                        time.as_secs()
                    ),
                    false => format!(
                        "the guest's init was not ready to be asked to shut down within {} s, or it is none; force it, or look at its console",
                        time.as_secs()
                    ),
                }))
            }
        }
    }
}

/// Tells whether the first-boot data must be written again.
fn seed_hash(guest: &ResolvedGuest) -> u64 {
    let mut h = DefaultHasher::new();
    let c = &guest.cloud_init;
    (&guest.hostname, &c.instance_id, &c.user_data, &c.vendor_data, &c.network_config).hash(&mut h);
    guest.root.path.hash(&mut h);
    guest.application.as_ref().map(|a| (&a.nameservers, &a.search, &a.addresses)).hash(&mut h);
    h.finish()
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

    async fn metrics(&self, instance: InstanceId) -> Result<Metrics> {
        self.shared.sample(instance).await
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
