//! One task owns one virtual machine: it alone talks QMP, follows events, and sees the end through the keeper.
//!
//! What may be asked in which state is a pure function ([`decide`]). Ending by force does not pass through here, so that
//! a QEMU that hangs can always be ended.

mod anew;
mod halt;

pub(crate) use halt::seen;

use crate::{
    directories,
    inside::Inside,
    launch::{self, Groups, explain},
    news::{self, Budget},
    qmp::{Event, Qmp},
    record::Record,
    sampling, saved, threshold, tpm, virtiofs,
};
use karst_guest::{
    Observed, Silence,
    keeper::{End, Exit, Keeper, Requested},
};
use karst_host::cgroup::Cgroups;
use karst_model::{
    Error, ErrorKind, Result,
    guest::{MonitorEvent, StopMode, ThresholdReached},
    instance::{ExitReason, HaltReason, RuntimeState},
    news::{Happened, MachineNews},
};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
    task::Poll,
    time::Duration,
};
use tokio::{
    sync::{broadcast, mpsc, oneshot, watch},
    time::{Instant, sleep_until, timeout},
};

/// Between two presses of the power button: a guest that still boots misses the first ones.
const PRESS: Duration = Duration::from_secs(5);
/// Before following the events is tried again.
const RECONNECT: Duration = Duration::from_secs(2);
/// How long a greeting may take when connecting again.
const GREETING: Duration = Duration::from_secs(2);

/// What can be asked of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ask {
    /// Freeze.
    Pause,
    /// Freeze; what an error halted is kept so: it does not go on by itself until it is resumed.
    Hold,
    /// Continue.
    Resume,
    /// Shut down, waiting so long.
    Graceful(Duration),
    /// Press the power button, once; `anew`: what shuts down then boots anew.
    Press { anew: bool },
}

/// What is then done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Do {
    /// It is so already.
    Nothing,
    /// QMP `stop`.
    Stop,
    /// It stands still by an error: it is to stay so.
    Keep,
    /// QMP `cont`.
    Cont,
    /// Press the power button, after `cont` where it does not run.
    PowerDown { cont: bool },
    /// Press it, and nothing else.
    Press { anew: bool },
}

/// The only place that says what is legal when.
fn decide(state: RuntimeState, ask: Ask) -> Result<Do> {
    use RuntimeState as S;
    match (ask, state) {
        (_, S::Stopped) => Err(Error::not_found("the guest is not running")),
        // One that stands still finds it pressed when it goes on.
        (Ask::Press { anew }, _) => Ok(Do::Press { anew }),
        (Ask::Pause | Ask::Hold, S::Paused) | (Ask::Resume, S::Running | S::Stopping) => Ok(Do::Nothing),
        (Ask::Pause | Ask::Hold, S::Stopping) => {
            Err(Error::conflict("the guest is shutting down; wait, or force it to stop"))
        }
        (Ask::Pause, S::Error) => {
            Err(Error::conflict("the guest is halted by an error; resume it or force it to stop"))
        }
        (Ask::Hold, S::Error) => Ok(Do::Keep),
        (Ask::Pause | Ask::Hold, S::Running | S::Starting) => Ok(Do::Stop),
        // After an error: the guest tries again what failed.
        (Ask::Resume, S::Paused | S::Error | S::Starting) => Ok(Do::Cont),
        // The virtual CPUs stand still, so it could not follow.
        (Ask::Graceful(_), S::Paused) => Ok(Do::PowerDown { cont: true }),
        (Ask::Graceful(_), S::Error) => Err(Error::conflict(
            "the guest is halted by an error (often a full disk) and cannot shut down; resume it or force it to stop",
        )),
        (Ask::Graceful(_), _) => Ok(Do::PowerDown { cont: false }),
    }
}

/// QEMU's run state. Of a machine that was held on request, or reset while it stood still, `prelaunch` is no start that is under
/// way.
pub(crate) fn run_state(status: &str, held: bool) -> RuntimeState {
    match status {
        "prelaunch" if held => RuntimeState::Paused,
        "paused" | "debug" | "suspended" | "save-vm" | "restore-vm" | "finish-migrate" | "postmigrate" => {
            RuntimeState::Paused
        }
        "io-error" | "internal-error" | "guest-panicked" | "watchdog" => RuntimeState::Error,
        "prelaunch" | "inmigrate" | "preconfig" => RuntimeState::Starting,
        _ => RuntimeState::Running,
    }
}

/// Why it ended: what QEMU said in its `SHUTDOWN` event, if we heard it, and what the keeper saw.
pub(crate) fn exit_reason(heard: Option<&str>, end: &End, record: &Record) -> ExitReason {
    let crashed = |detail: &str| ExitReason::Crashed { detail: detail.to_owned() };
    let status = match end {
        End::Exited(s) => s,
        End::KeeperLost(_) => return crashed("its keeper was killed, and QEMU with it"),
    };
    match (status.requested, status.exit, heard) {
        (Requested::Force | Requested::Deadline, ..) => ExitReason::Forced,
        (_, Some(Exit::Code(0)), Some("guest-panic")) => crashed("the guest's kernel panicked"),
        (_, Some(Exit::Code(0)), Some("host-signal" | "host-qmp-quit" | "host-ui")) => ExitReason::Forced,
        (_, Some(Exit::Code(0)), _) => ExitReason::Shutdown,
        (_, Some(Exit::Code(_)), _) => crashed(&explain(&status.output, record).message),
        (_, Some(Exit::Signal(9)), _) => crashed("QEMU was killed; the host may have run out of memory"),
        (_, Some(Exit::Signal(n)), _) => crashed(&format!("QEMU crashed with signal {n}")),
        (_, None, _) => crashed(&crate::line::printable(&status.reason, 300)),
    }
}

/// What is asked of a machine's owner, and where the answer goes.
type Request = (Ask, oneshot::Sender<Result<()>>);

/// A machine as the driver holds it. When the driver lets go of it, its owner ends and QEMU runs on.
pub(crate) struct Machine {
    inner: Arc<Inner>,
    requests: mpsc::Sender<Request>,
}

impl std::ops::Deref for Machine {
    type Target = Inner;
    fn deref(&self) -> &Inner {
        &self.inner
    }
}

/// What the driver and the owner share.
pub(crate) struct Inner {
    pub(crate) dir: PathBuf,
    pub(crate) keeper: Keeper,
    pub(crate) inside: Arc<Inside>,
    /// What it does; `Stopped` is set last, when everything is cleared up.
    pub(crate) observed: watch::Sender<Observed>,
    record: Mutex<Record>,
    /// Who makes its file systems still, or lets them go on.
    pub(crate) still: tokio::sync::Mutex<()>,
    /// Who begins or ends a copy of a disk.
    pub(crate) copying: tokio::sync::Mutex<()>,
    /// Who hears what happens in it, and how much more is told.
    news: (broadcast::Sender<MachineNews>, Mutex<Budget>),
    /// Shared directories whose virtiofsd ended before it did, by the names of their devices.
    pub(crate) lost: Mutex<BTreeSet<String>>,
    /// Held while the keeper is told who asked for the end, so that none tells it what another has just made untrue.
    pub(crate) telling: tokio::sync::Mutex<()>,
    /// What its samples are made with.
    pub(crate) sampled: sampling::Kept,
}

impl Inner {
    /// Tells what happened in it, unless that was too much lately.
    pub(crate) fn tell(&self, what: Happened) {
        let (listeners, budget) = &self.news;
        if budget.lock().unwrap_or_else(|e| e.into_inner()).take() {
            let instance = self.record().instance;
            // An error only says that nobody listens.
            let _ = listeners.send(MachineNews { instance, what });
        }
    }

    /// The record.
    pub(crate) fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Machine {
    /// What it does now.
    pub(crate) fn now(&self) -> Observed {
        self.observed.borrow().clone()
    }

    /// Does its owner live? One that broke off (a fault of ours) says nothing any more: the machine must be adopted anew.
    pub(crate) fn is_owned(&self) -> bool {
        !self.requests.is_closed()
    }

    /// Why its owner does not answer. It says last that the machine has ended.
    fn gone(&self) -> Error {
        match self.now().state {
            RuntimeState::Stopped => Error::not_found("the guest is not running"),
            _ => Error::internal("watching the guest broke off; try again", "its owner is gone"),
        }
    }

    /// Asks, and waits until it is done.
    pub(crate) async fn ask(&self, ask: Ask) -> Result<()> {
        let (send, receive) = oneshot::channel();
        self.requests.send((ask, send)).await.map_err(|_| self.gone())?;
        receive.await.map_err(|_| self.gone())?
    }

    /// Waits until it has ended and nothing of it is left.
    ///
    /// # Errors
    /// Internal when its owner broke off.
    pub(crate) async fn ended(&self) -> Result<Observed> {
        let mut observed = self.observed.subscribe();
        let stopped = async { observed.wait_for(|o| o.state == RuntimeState::Stopped).await.is_ok() };
        tokio::select! {
            biased;
            _ = stopped => {}
            () = self.requests.closed() => {}
        }
        let now = self.now();
        if now.state == RuntimeState::Stopped { Ok(now) } else { Err(self.gone()) }
    }
}

/// What tells the driver of changes.
pub(crate) type Tell = Arc<dyn Fn(Observed) + Send + Sync>;

/// Whom its owner tells what.
#[derive(Clone)]
pub(crate) struct Tells {
    /// The driver, of changes.
    pub(crate) changed: Tell,
    /// Who follows the events of QEMU's monitor.
    pub(crate) heard: broadcast::Sender<MonitorEvent>,
    /// Who waits for thresholds of disks.
    pub(crate) reached: broadcast::Sender<ThresholdReached>,
    /// Who hears what happens in machines.
    pub(crate) news: broadcast::Sender<MachineNews>,
}

/// Begins to own a machine that runs.
pub(crate) fn own(
    dir: PathBuf,
    record: Record,
    keeper: Keeper,
    observed: Observed,
    cgroups: Arc<Cgroups>,
    silence: Arc<Silence>,
    tell: Tells,
) -> Arc<Machine> {
    let (requests, receiver) = mpsc::channel(16);
    let inside = Inside::new(dir.clone(), record.hostname.clone());
    let machine = Arc::new(Inner {
        inside: Arc::new(inside.with_directories(directories::mounts(&record.directories, &record.virtiofs))),
        dir,
        keeper,
        observed: watch::Sender::new(observed),
        record: Mutex::new(record),
        still: tokio::sync::Mutex::default(),
        copying: tokio::sync::Mutex::default(),
        telling: tokio::sync::Mutex::default(),
        sampled: sampling::Kept::default(),
        lost: Mutex::default(),
        news: (tell.news.clone(), Mutex::default()),
    });
    virtiofs::watch(&machine);
    let owner = Owner {
        anew: machine.record().anew.then(|| Instant::now() + anew::WINDOW),
        reconnect: Some(Instant::now()),
        machine: machine.clone(),
        following: None,
        events: None,
        stopping: None,
        full: None,
        heard: None,
        cgroups,
        silence,
        tell,
    };
    tokio::spawn(owner.run(receiver));
    Arc::new(Machine { inner: machine, requests })
}

/// A shutdown that was asked for. Over when nobody waits for it any more, be it that the time has passed or that whoever
/// asked has gone away.
struct Stopping {
    next_press: Instant,
    waiters: Vec<(Instant, oneshot::Sender<Result<()>>)>,
    /// Asks the agents.
    inside: tokio::task::JoinHandle<()>,
}

/// Waits until one who waited for a shutdown has gone away.
async fn gone(stopping: &mut Option<Stopping>) {
    std::future::poll_fn(|cx| {
        let mut gone = false;
        // Each is asked, so that each wakes.
        for (_, reply) in stopping.iter_mut().flat_map(|s| s.waiters.iter_mut()) {
            gone |= reply.poll_closed(cx).is_ready();
        }
        if gone { Poll::Ready(()) } else { Poll::Pending }
    })
    .await
}

struct Owner {
    machine: Arc<Inner>,
    /// Held for its events.
    following: Option<Qmp>,
    events: Option<mpsc::Receiver<Event>>,
    reconnect: Option<Instant>,
    stopping: Option<Stopping>,
    /// Halted by a full disk: when to look again whether there is room.
    full: Option<Instant>,
    /// Until when a guest that shuts down boots anew.
    anew: Option<Instant>,
    /// Reason of the `SHUTDOWN` event.
    heard: Option<String>,
    cgroups: Arc<Cgroups>,
    silence: Arc<Silence>,
    tell: Tells,
}

async fn next(events: &mut Option<mpsc::Receiver<Event>>) -> Option<Event> {
    match events {
        Some(e) => e.recv().await,
        None => std::future::pending().await,
    }
}

impl Owner {
    async fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        let (watched, instance) = (self.machine.keeper.clone(), self.machine.record().instance);
        let silence = self.silence.clone();
        let watch = |after: Duration| {
            let (keeper, silence) = (watched.clone(), silence.clone());
            Box::pin(async move {
                tokio::time::sleep(after).await;
                silence.over(instance).await;
                keeper.wait_exit().await
            })
        };
        let mut ended = watch(Duration::ZERO);
        loop {
            let alarm = [
                self.reconnect,
                self.full,
                self.anew,
                self.stopping.as_ref().map(|s| s.next_press),
                self.stopping.as_ref().and_then(|s| s.waiters.iter().map(|(at, _)| *at).min()),
            ]
            .into_iter()
            .flatten()
            .min();
            let alarm = async {
                match alarm {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                end = &mut ended => match end {
                    Ok(end) => return self.finish(end).await,
                    Err(e) if e.is(ErrorKind::Timeout) => {
                        silence.note(instance, watched.dir());
                        ended = watch(Duration::ZERO);
                    }
                    Err(e) => {
                        tracing::warn!(instance = %self.machine.record().instance, error = %e, context = e.context, "watching a guest failed");
                        ended = watch(Duration::from_secs(1));
                    }
                },
                event = next(&mut self.events) => match event {
                    Some(event) => self.event(event).await,
                    None => {
                        self.events = None;
                        self.following = None;
                        self.reconnect = Some(Instant::now() + RECONNECT);
                    }
                },
                request = requests.recv() => match request {
                    Some((ask, reply)) => self.request(ask, reply).await,
                    None => return, // the driver is gone; QEMU stays
                },
                () = alarm => self.tick().await,
                () = gone(&mut self.stopping) => self.tick().await,
            }
        }
    }

    fn state(&self) -> RuntimeState {
        self.machine.observed.borrow().state
    }

    /// A change that nobody asked for is told.
    fn set_state(&self, state: RuntimeState, told: bool) {
        let before = self.state();
        if before == RuntimeState::Error && matches!(state, RuntimeState::Running | RuntimeState::Stopping) {
            self.machine.tell(Happened::Recovered);
        }
        let changed = self.machine.observed.send_if_modified(|o| {
            let changed = o.state != state;
            o.state = state;
            // One that is kept so keeps its reason.
            if !matches!(state, RuntimeState::Error | RuntimeState::Paused) {
                o.halt = None;
            }
            changed
        });
        if changed && told {
            (self.tell.changed)(self.machine.observed.borrow().clone());
        }
    }

    fn running(&self) -> RuntimeState {
        if self.stopping.is_some() { RuntimeState::Stopping } else { RuntimeState::Running }
    }

    /// Tells those who follow it, if anybody does.
    fn pass_on(&self, event: &Event) {
        if self.tell.heard.receiver_count() == 0 {
            return;
        }
        let event = MonitorEvent {
            instance: self.machine.record().instance,
            event: event.name.clone(),
            data: event.data.clone(),
            seconds: event.at.0,
            micros: event.at.1,
        };
        // Nobody follows them any more: nothing is lost.
        let _ = self.tell.heard.send(event);
    }

    async fn event(&mut self, event: Event) {
        self.pass_on(&event);
        // A guest that boots anew by its power button shuts down for that only.
        if let Some(what) = news::of(&event).filter(|w| *w != Happened::ShutDown || self.anew.is_none()) {
            self.machine.tell(what);
        }
        let text = |k: &str| event.data.get(k).and_then(Value::as_str);
        match event.name.as_str() {
            // The first is why; what follows, such as our own `quit`, is only how.
            "SHUTDOWN" if self.heard.is_none() => self.heard = text("reason").map(str::to_owned),
            "BLOCK_IO_ERROR" if text("action") == Some("stop") => {
                tracing::warn!(instance = %self.machine.record().instance, reason = text("reason"), "a guest is halted by an error of its disk");
                let kept = self.machine.record().kept_halted;
                self.full = (!kept).then(|| Instant::now() + halt::ROOM_EVERY);
                let slot = text("node-name").and_then(news::slot_of_node);
                let full = event.data.get("nospace").and_then(Value::as_bool) == Some(true);
                self.halted(Some(HaltReason::Disk { slot, full }));
            }
            // Asked rather than concluded: by now a later command may have undone it.
            "STOP" | "RESUME" => self.refresh().await,
            // One that an error had halted only stands still then.
            "RESET" if self.state() == RuntimeState::Error => self.refresh().await,
            "BLOCK_WRITE_THRESHOLD" => {
                let instance = self.machine.record().instance;
                if let Some(reached) = threshold::reached(instance, &event) {
                    // An error only says that nobody waits for any.
                    let _ = self.tell.reached.send(reached);
                }
            }
            "VSERPORT_CHANGE" => {
                if let (Some(id), Some(open)) = (text("id"), event.data.get("open").and_then(Value::as_bool))
                {
                    let inside = &self.machine.inside;
                    let before = inside.kind().is_some();
                    inside.port(id, open);
                    let connected = inside.kind().is_some();
                    if before != connected {
                        self.machine.tell(Happened::Agent { connected });
                    }
                }
            }
            _ => {}
        }
    }

    async fn execute(&self, command: &str) -> Result<Value> {
        // The connection must not outlive the command: see there.
        let (qmp, _) = Qmp::connect(&self.machine.dir, launch::QMP, GREETING).await?;
        qmp.execute(command, json!({})).await
    }

    async fn qmp(&self, command: &str, arguments: Value) -> Result<()> {
        let (qmp, _) = Qmp::connect(&self.machine.dir, launch::QMP, GREETING).await?;
        qmp.execute(command, arguments).await.map(drop)
    }

    /// Learns what events could not tell while nobody followed them.
    async fn refresh(&mut self) {
        if let Ok(v) = self.execute("query-status").await
            && let Some(s) = v.get("status").and_then(Value::as_str)
        {
            let (held, kept) = {
                let record = self.machine.record();
                (record.held, record.kept_halted)
            };
            // Also after an adoption, and when somebody else has resumed it.
            let full = s == "io-error" && !kept;
            self.full = full.then(|| self.full.unwrap_or(Instant::now() + halt::ROOM_EVERY));
            match run_state(s, held) {
                RuntimeState::Error => {
                    let disks = match s {
                        "io-error" => self.execute("query-block").await.ok(),
                        _ => None,
                    };
                    self.halted(halt::reason(s, disks.as_ref().and_then(halt::failed_disk)));
                }
                other => {
                    if kept && let Err(e) = self.keep_halted(false) {
                        tracing::warn!(error = %e, "the record of a guest could not be written");
                    }
                    let state = if other == RuntimeState::Running { self.running() } else { other };
                    self.set_state(state, true);
                }
            }
            if s == "shutdown" {
                self.has_shut_down().await;
            }
        }
        if let Ok(v) = self.execute("query-chardev").await {
            self.machine.inside.ports(&v);
        }
    }

    async fn request(&mut self, ask: Ask, reply: oneshot::Sender<Result<()>>) {
        if ask == Ask::Resume && self.machine.record().kept_halted {
            let released = self.release().await;
            return drop(reply.send(released));
        }
        let action = match decide(self.state(), ask) {
            Ok(a) => a,
            Err(e) => return drop(reply.send(Err(e))),
        };
        let result = match action {
            Do::Nothing => Ok(()),
            Do::Press { anew } => self.press(anew).await,
            Do::Stop => self.command("stop", RuntimeState::Paused).await,
            Do::Keep => self.keep_halted(true).map(|()| {
                self.full = None;
                self.set_state(RuntimeState::Paused, false);
            }),
            Do::Cont => {
                let to = self.running();
                self.cont(to).await
            }
            Do::PowerDown { cont } => {
                let woken = if cont { self.cont(RuntimeState::Running).await } else { Ok(()) };
                match woken.and(self.stays_down().await) {
                    Err(e) => Err(e),
                    Ok(()) => {
                        let Ask::Graceful(time) = ask else { return };
                        let waiter = (Instant::now() + time.min(StopMode::LONGEST), reply);
                        match &mut self.stopping {
                            Some(s) => s.waiters.push(waiter),
                            None => {
                                {
                                    let _telling = self.machine.telling.lock().await;
                                    let _ = self.machine.keeper.mark(Requested::Shutdown).await;
                                }
                                self.set_state(RuntimeState::Stopping, false);
                                // Beside the power button: some systems do not listen to the button, others have no agent.
                                let inside = self.machine.inside.shut_down();
                                let (next_press, waiters) = (Instant::now(), vec![waiter]);
                                self.stopping = Some(Stopping { next_press, waiters, inside });
                            }
                        }
                        return;
                    }
                }
            }
        };
        let _ = reply.send(result);
    }

    /// Lets the processors run: memory that was saved before is then of the past.
    async fn cont(&mut self, then: RuntimeState) -> Result<()> {
        saved::discard(&self.machine.dir)?;
        self.command("cont", then).await
    }

    async fn command(&mut self, command: &str, then: RuntimeState) -> Result<()> {
        self.execute(command).await.map_err(|e| match e.context.as_deref() {
            // QEMU's word for a machine that only a reset brings back.
            Some(said) if said.contains("Resetting the Virtual Machine") => {
                Error::conflict("the guest cannot go on from its error; restart it by force")
                    .with_context(said)
            }
            _ => e,
        })?;
        self.set_state(then, false);
        Ok(())
    }

    async fn tick(&mut self) {
        let now = Instant::now();
        if self.reconnect.is_some_and(|at| at <= now) {
            self.reconnect = None;
            // Short: while another follows the events, this task has other things to do.
            match Qmp::connect(&self.machine.dir, launch::EVENTS, Duration::from_millis(200)).await {
                Ok((qmp, events)) => {
                    self.following = Some(qmp);
                    self.events = Some(events);
                    self.refresh().await;
                }
                Err(_) => self.reconnect = Some(Instant::now() + RECONNECT),
            }
        }
        if self.full.is_some_and(|at| at <= now) {
            self.full = None;
            self.go_on_with_room().await;
        }
        if self.anew.is_some_and(|at| at <= now)
            && let Err(e) = self.stays_down().await
        {
            tracing::debug!(error = %e, "QEMU does not take it back that its guest was to boot anew");
            self.anew = Some(now + RECONNECT);
        }
        let Some(stopping) = &mut self.stopping else {
            return;
        };
        let done = |(at, reply): &(Instant, oneshot::Sender<Result<()>>)| *at <= now || reply.is_closed();
        let (late, waiting): (Vec<_>, Vec<_>) = stopping.waiters.drain(..).partition(done);
        stopping.waiters = waiting;
        let over = stopping.waiters.is_empty();
        let press = stopping.next_press <= now;
        if press {
            stopping.next_press = now + PRESS;
        }
        if over {
            stopping.inside.abort();
            self.stopping = None;
            self.take_back().await;
            if self.state() == RuntimeState::Stopping {
                self.set_state(RuntimeState::Running, false);
            }
        } else if press && let Err(e) = self.execute("system_powerdown").await {
            tracing::debug!(error = %e, "the power button could not be pressed");
        }
        // Last: who is told finds the state that it is told of.
        for (_, reply) in late {
            let _ = reply.send(Err(Error::timeout(
                "the guest did not shut down in time and runs on; force it, or look at its console",
            )));
        }
    }

    /// Nobody asks for the end any more, unless somebody forces it now.
    async fn take_back(&self) {
        let keeper = &self.machine.keeper;
        let _telling = self.machine.telling.lock().await;
        if keeper.status().await.is_ok_and(|s| s.requested == Requested::Shutdown) {
            let _ = keeper.mark(Requested::Nobody).await;
        }
    }

    async fn finish(mut self, end: End) {
        // QEMU's last words may still be on the way; its end closes the connection.
        let following = self.events.is_some();
        let _ = timeout(Duration::from_secs(u64::from(following)), async {
            while let Some(event) = next(&mut self.events).await {
                if event.name == "SHUTDOWN" {
                    self.event(event).await;
                }
            }
        })
        .await;
        let (instance, groups) = {
            let mut record = self.machine.record();
            let reason = exit_reason(self.heard.as_deref(), &end, &record);
            record.exit = Some(reason);
            if let Err(e) = record.write(&self.machine.dir) {
                tracing::warn!(instance = %record.instance, error = %e, context = e.context, "a guest's end could not be written down");
            }
            (record.instance, Groups::of(&record.daemon_id, record.instance))
        };
        // Nobody answers there any more.
        self.machine.inside.port("karst", false);
        let _ = karst_guest::keeper::wait_gone(&self.machine.dir).await;
        // Not under a successor of ours that was quicker.
        let replaced = karst_guest::keeper::is_alive(&self.machine.dir);
        if !replaced && let Err(e) = tpm::end(&self.machine.dir).await {
            tracing::warn!(%instance, error = %e, context = e.context, "the TPM of a guest could not be ended");
        }
        if !replaced && let Err(e) = virtiofs::end(&self.machine.dir).await {
            tracing::warn!(%instance, error = %e, context = e.context, "who shares directories of a guest could not be ended");
        }
        let record = self.machine.record().clone();
        if !replaced && let Err(e) = crate::launch::drop_links(&record) {
            tracing::warn!(%instance, error = %e, context = e.context, "a network interface of a guest could not be removed");
        }
        if !replaced && let Err(e) = groups.remove(&self.cgroups).await {
            tracing::warn!(%instance, error = %e, context = e.context, "control groups of a guest could not be removed");
        }
        let exit = self.machine.record().exit.clone();
        self.machine.observed.send_modify(|o| {
            o.state = RuntimeState::Stopped;
            o.pid = None;
            o.started_at = None;
            o.exit = exit;
            o.halt = None;
        });
        for (_, reply) in self.stopping.take().into_iter().flat_map(|s| s.waiters) {
            let _ = reply.send(Ok(()));
        }
        (self.tell.changed)(self.machine.observed.borrow().clone());
    }
}

/// A machine that runs, as far as is told of it. Whoever has the receiver is its owner.
#[cfg(test)]
pub(crate) fn without_owner(dir: PathBuf) -> (Machine, mpsc::Receiver<Request>) {
    let id = karst_model::InstanceId(Default::default());
    let record = json!({
        "version": 1, "instance": id, "daemon_id": "aaaaaa", "generation": {"incarnation": 1, "n": 1},
        "spec_version": 1, "domain_id": 1, "hostname": "v1", "ids": {"base": 100_000, "count": 1},
        "accelerator": "tcg", "memory": 1, "cpus": 1, "cpu": null, "root": "/nonexistent", "nics": []
    });
    let record: Record = serde_json::from_value(record).unwrap();
    let observed = Observed {
        instance: id,
        generation: record.generation,
        state: RuntimeState::Running,
        pid: None,
        domain_id: None,
        started_at: None,
        exit: None,
        halt: None,
        applied_spec_version: 1,
        accelerator: None,
    };
    let (requests, receiver) = mpsc::channel(1);
    let inner = Arc::new(Inner {
        inside: Arc::new(Inside::new(dir.clone(), "v1".into())),
        keeper: Keeper::unasked(&dir),
        dir,
        observed: watch::Sender::new(observed),
        record: Mutex::new(record),
        copying: tokio::sync::Mutex::default(),
        still: tokio::sync::Mutex::default(),
        telling: tokio::sync::Mutex::default(),
        sampled: sampling::Kept::default(),
        lost: Mutex::default(),
        news: (broadcast::channel(1).0, Mutex::default()),
    });
    (Machine { inner, requests }, receiver)
}

#[cfg(test)]
mod tests {
    use super::*;
    use RuntimeState as S;

    #[test]
    fn only_what_is_legal_and_the_refusal_says_what_to_do() {
        let wait = Ask::Graceful(Duration::ZERO);
        for ask in [Ask::Pause, Ask::Resume, wait, Ask::Press { anew: true }] {
            assert!(decide(S::Stopped, ask).unwrap_err().is(karst_model::ErrorKind::NotFound));
        }
        assert_eq!(decide(S::Running, Ask::Pause).unwrap(), Do::Stop);
        assert_eq!(decide(S::Paused, Ask::Pause).unwrap(), Do::Nothing);
        assert_eq!(decide(S::Paused, Ask::Resume).unwrap(), Do::Cont);
        assert_eq!(decide(S::Error, Ask::Resume).unwrap(), Do::Cont);
        // For a copy of its disks it is kept as it is; nobody else freezes it.
        assert_eq!(decide(S::Error, Ask::Hold).unwrap(), Do::Keep);
        assert!(decide(S::Error, Ask::Pause).unwrap_err().message.contains("resume it"));
        assert_eq!(decide(S::Running, Ask::Hold).unwrap(), Do::Stop);
        assert_eq!(decide(S::Running, Ask::Resume).unwrap(), Do::Nothing);
        assert_eq!(decide(S::Paused, wait).unwrap(), Do::PowerDown { cont: true });
        assert_eq!(decide(S::Running, wait).unwrap(), Do::PowerDown { cont: false });
        for state in [S::Running, S::Paused, S::Stopping, S::Error] {
            assert_eq!(decide(state, Ask::Press { anew: false }).unwrap(), Do::Press { anew: false });
        }
        assert!(decide(S::Error, wait).unwrap_err().message.contains("force"));
        assert!(decide(S::Stopping, Ask::Pause).unwrap_err().message.contains("shutting down"));
    }

    #[tokio::test]
    async fn an_owner_that_broke_off_is_noticed() {
        let (machine, receiver) = without_owner(PathBuf::from("/nonexistent"));
        assert!(machine.is_owned());
        // As when the task of the owner panics.
        drop(receiver);
        assert!(!machine.is_owned());
        assert!(machine.ask(Ask::Pause).await.unwrap_err().is(ErrorKind::Internal));
        let end = timeout(Duration::from_secs(60), machine.ended()).await.expect("nobody says any more");
        assert!(end.unwrap_err().is(ErrorKind::Internal));
        // An owner that ended with its machine.
        machine.observed.send_modify(|o| o.state = S::Stopped);
        assert!(machine.ask(Ask::Pause).await.unwrap_err().is(ErrorKind::NotFound));
        assert_eq!(machine.ended().await.unwrap().state, S::Stopped);
    }

    #[tokio::test(start_paused = true)]
    async fn who_serves_a_directory_is_missed_when_it_ends_and_its_machine_does_not() {
        let told = async |stops: bool| {
            let dir = tempfile::tempdir().unwrap();
            let (machine, _owner) = without_owner(dir.path().to_owned());
            {
                let mut record = machine.record();
                let directory = crate::directories::tests::directory;
                record.directories = vec![directory("data", "fs0"), directory("by-9p", "fs1")];
                record.virtiofs = ["fs0".to_owned()].into();
            }
            // There is no keeper: it has ended.
            virtiofs::watch(&machine.inner);
            tokio::time::sleep(Duration::from_secs(1)).await;
            if stops {
                machine.observed.send_modify(|o| o.state = S::Stopped);
            }
            tokio::time::sleep(Duration::from_secs(60)).await;
            virtiofs::warnings(&machine)
        };
        let warnings = told(false).await;
        assert!(warnings.len() == 1 && warnings[0].contains("\"data\""), "{warnings:?}");
        assert_eq!(told(true).await, Vec::<String>::new(), "it ended with its machine");
    }

    #[test]
    fn run_states() {
        for (text, state) in [
            ("running", S::Running),
            ("paused", S::Paused),
            ("io-error", S::Error),
            ("prelaunch", S::Starting),
        ] {
            assert_eq!(run_state(text, false), state);
            let held = if text == "prelaunch" { S::Paused } else { state };
            assert_eq!(run_state(text, true), held);
        }
    }
}
