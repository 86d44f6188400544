//! A host in memory: the same rules as the real agent, faults on demand, cheap enough for a thousand of them.
//!
//! It has no tasks of its own. What takes time (an address after the start, a shutdown) is worked out when somebody asks,
//! by the clock of its [`Env`](karst_env::Env), so it runs in a seeded world too. Only sessions (exec, console, writing
//! a file) use descriptors and threads, as the real ones use processes; seeded tests stay away from them.

mod backups;
mod calls;
mod checkpoints;
mod copies;
mod descriptions;
mod files;
mod halt;
mod hardware;
mod keys;
mod layers;
mod memory;
mod monitor;
mod pools;
mod publish;
mod session;
mod state;
mod storage;
mod threads;
mod work;

use crate::{
    calls::{AgentEvent, CallContext},
    epoch::EpochGuard,
    events::EventHub,
    resources::UsbResources,
};
use futures::future::{Either, select};
use karst_env::{EnvExt, SharedEnv};
use karst_model::{
    ByteSize, Error, InstanceId, Result,
    instance::ExitReason,
    news::{Happened, MachineNews},
    screens::ScreenGrants,
};
use state::State;
use std::{
    collections::{BTreeMap, VecDeque},
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::sync::watch;

/// Below this a simulated host grants files for memory of machines.
pub const SAVES: &str = "/srv/saves/";

/// What a simulated host is like.
#[derive(Debug, Clone)]
pub struct SimulatedOptions {
    /// Host name, and its endpoint on the environment's links.
    pub name: String,
    /// The caller's endpoint: calls and answers pass the environment's link between the two. `None`: no link.
    pub caller: Option<String>,
    /// Short id of the daemon that host interfaces must carry; `None`: not checked.
    pub daemon_id: Option<String>,
    /// Each call takes a time between these.
    pub latency: (Duration, Duration),
    /// Time from a guest's start to its address.
    pub address_after: Duration,
    /// Time that a guest takes to shut down when asked.
    pub shutdown_time: Duration,
    /// Time that building an image takes.
    pub build_time: Duration,
    /// Time that copying a disk of a running machine takes.
    pub copy_time: Duration,
    /// Time that writing the memory of a machine takes.
    pub memory_time: Duration,
    /// Size of each pool.
    pub pool_size: ByteSize,
    /// Bridges of others on this host, which are never touched.
    pub foreign_bridges: Vec<String>,
    /// CPUs and memory that the host tells.
    pub cpus: u32,
    /// See `cpus`.
    pub memory: ByteSize,
    /// Where the host lets screens listen.
    pub screens: ScreenGrants,
}

impl Default for SimulatedOptions {
    fn default() -> Self {
        Self {
            name: "simulated".into(),
            caller: None,
            daemon_id: None,
            latency: (Duration::ZERO, Duration::ZERO),
            address_after: Duration::from_millis(800),
            shutdown_time: Duration::from_millis(50),
            build_time: Duration::from_millis(100),
            copy_time: Duration::from_millis(300),
            memory_time: Duration::from_millis(200),
            pool_size: ByteSize::gib(1024),
            foreign_bridges: vec!["docker0".into()],
            cpus: 16,
            memory: ByteSize::gib(64),
            screens: ScreenGrants::all(),
        }
    }
}

/// What goes wrong with one call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// It fails and has no effect.
    FailBefore(Error),
    /// It has its effect and fails all the same.
    FailAfter(Error),
    /// It takes this much longer before its effect.
    Delay(Duration),
    /// It has no effect and never ends: deadline, cancel or crash end it.
    HangBefore,
    /// It has its effect and never ends.
    HangAfter,
    /// The agent crashes before its effect ([`SimulatedAgent::crash`]).
    CrashBefore,
    /// The agent crashes after its effect.
    CrashAfter,
}

/// A simulated host.
pub struct SimulatedAgent {
    env: SharedEnv,
    options: SimulatedOptions,
    guard: Arc<EpochGuard>,
    events: Arc<EventHub>,
    state: Arc<Mutex<State>>,
    faults: Mutex<BTreeMap<&'static str, VecDeque<Fault>>>,
    counts: Mutex<BTreeMap<&'static str, u64>>,
    /// Grows with each crash; calls in flight watch it.
    incarnation: watch::Sender<u64>,
    reachable: watch::Sender<bool>,
    /// Grows with each start of the machine.
    boots: AtomicU64,
}

impl SimulatedAgent {
    /// A host without anything on it.
    pub fn new(env: SharedEnv, options: SimulatedOptions) -> Arc<Self> {
        Arc::new(Self {
            env,
            options,
            guard: Arc::new(EpochGuard::in_memory()),
            events: Arc::default(),
            state: Arc::default(),
            faults: Mutex::default(),
            counts: Mutex::default(),
            incarnation: watch::Sender::new(0),
            reachable: watch::Sender::new(true),
            boots: AtomicU64::new(1),
        })
    }

    /// The guard of its epochs, for the server in front of it.
    pub fn guard(&self) -> Arc<EpochGuard> {
        self.guard.clone()
    }

    /// The next call of this name (as in [`crate::Call::NAMES`]) goes wrong so; several queue up.
    ///
    /// # Panics
    /// When there is no such call: a test would wait for nothing.
    pub fn inject(&self, call: &str, fault: Fault) {
        let names = crate::calls::Call::NAMES;
        let name = names.iter().find(|n| **n == call).expect("a call of the protocol");
        self.faults.lock().unwrap().entry(name).or_default().push_back(fault);
    }

    /// Is what is in a volume a full copy of what it was made of? `None`: there is no such volume.
    pub fn is_full_copy(&self, volume: karst_model::VolumeId) -> Option<bool> {
        self.lock().volumes.get(&volume).map(|v| v.full)
    }

    /// From now on these USB devices are plugged into the host, beside the one that it always has.
    pub fn plug(&self, devices: Vec<UsbResources>) {
        self.lock().plugged = devices;
    }

    /// Faults that no call has met yet.
    pub fn faults_left(&self) -> usize {
        self.faults.lock().unwrap().values().map(VecDeque::len).sum()
    }

    /// Sessions that nobody has closed yet, those that are over included.
    pub fn sessions_kept(&self) -> usize {
        self.lock().sessions.len()
    }

    /// How often a call was made so far, of whatever outcome.
    pub fn count(&self, call: &str) -> u64 {
        self.counts.lock().unwrap().get(call).copied().unwrap_or(0)
    }

    /// The host process dies and comes back: calls in flight fail as unavailable with whatever effect they had, sessions
    /// and staged uploads are gone, receivers of events get [`AgentEvent::Lost`]. Guests run on; epochs are remembered.
    pub fn crash(&self) {
        self.incarnation.send_modify(|n| *n += 1);
        let mut state = self.lock();
        state.staged.clear();
        let sessions = std::mem::take(&mut state.sessions);
        drop(state);
        for session in sessions.into_values() {
            session.end();
        }
        self.events.publish(&AgentEvent::Lost);
    }

    /// Whether calls arrive at all; while not, they fail as unavailable, also those in flight.
    pub fn set_reachable(&self, reachable: bool) {
        self.reachable.send_replace(reachable);
    }

    /// The whole machine loses its power and starts again: as a crash, no guest runs any more, and the boot id is another.
    pub fn power_cut(&self) {
        self.cut(false);
    }

    /// The same, and what the host had written down of the guests that ran is lost too: why they ended, it cannot say.
    pub fn power_cut_that_tears(&self) {
        self.cut(true);
    }

    fn cut(&self, tears: bool) {
        self.boots.fetch_add(1, Ordering::Relaxed);
        let now = self.env.monotonic();
        let mut state = self.lock();
        let running: Vec<_> = state.guests.values_mut().filter(|g| g.runs()).collect();
        for guest in running {
            guest.ended(now, ExitReason::Crashed { detail: "the host lost its power".into() });
            if tears {
                guest.exit = None;
            }
        }
        drop(state);
        self.crash();
    }

    /// A guest ends by itself. Answers whether it ran.
    pub fn crash_guest(&self, instance: InstanceId) -> bool {
        self.end_guest(instance, ExitReason::Crashed { detail: "killed by signal 9".into() })
    }

    /// A guest shuts itself down. Answers whether it ran.
    pub fn shut_down_guest(&self, instance: InstanceId) -> bool {
        self.end_guest(instance, ExitReason::Shutdown)
    }

    fn end_guest(&self, instance: InstanceId, why: ExitReason) -> bool {
        let now = self.env.monotonic();
        let mut state = self.lock();
        let Some(guest) = state.guests.get_mut(&instance).filter(|g| g.runs()) else {
            return false;
        };
        guest.ended(now, why);
        let observed = guest.observed();
        let sessions = state.take_sessions_of(instance);
        drop(state);
        for session in sessions {
            session.end();
        }
        self.publish(observed);
        true
    }

    /// From now on a guest does not follow requests to shut down (or follows them again).
    pub fn set_ignores_shutdown(&self, instance: InstanceId, ignores: bool) {
        if let Some(guest) = self.lock().guests.get_mut(&instance) {
            guest.ignores_shutdown = ignores;
        }
    }

    /// A guest that refuses to be changed while it runs, as one whose memory cannot be taken.
    pub fn set_refuses_update(&self, instance: InstanceId, refuses: bool) {
        if let Some(guest) = self.lock().guests.get_mut(&instance) {
            guest.refuses_update = refuses;
        }
    }

    /// The guests that the host was told of on a network.
    pub fn network_hosts(&self, id: karst_model::NetworkId) -> Vec<karst_model::spec::NetworkHost> {
        self.lock().networks.get(&id).map(|n| n.spec.hosts.clone()).unwrap_or_default()
    }

    /// A network as the host was last told.
    pub fn network_spec(&self, id: karst_model::NetworkId) -> Option<karst_model::spec::NetworkSpec> {
        self.lock().networks.get(&id).map(|n| n.spec.clone())
    }

    /// What viewers of a machine's display have to know now, as the host was last told.
    pub fn guard_of_display(&self, instance: InstanceId) -> Option<karst_model::display::DisplayGuard> {
        self.lock().guests.get(&instance)?.display_guard.clone()
    }

    /// What a guest has now.
    pub fn guest_spec(&self, instance: InstanceId) -> Option<karst_model::spec::GuestSpec> {
        self.lock().guests.get(&instance).map(|g| g.spec.clone())
    }

    /// The limits that a guest has now.
    pub fn guest_limits(&self, instance: InstanceId) -> Option<karst_model::spec::Limits> {
        self.lock().guests.get(&instance).map(|g| g.spec.limits.clone())
    }

    /// The disks beside its root that a guest has now.
    pub fn guest_disks(&self, instance: InstanceId) -> Option<Vec<karst_model::spec::DiskSpec>> {
        self.lock().guests.get(&instance).map(|g| g.spec.disks.clone())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The state with everything that time has done to it.
    fn settled(&self) -> MutexGuard<'_, State> {
        let now = self.env.monotonic();
        let mut state = self.lock();
        let mut gone = vec![];
        for guest in state.guests.values_mut() {
            if guest.stops_at.is_some_and(|at| at <= now) && guest.runs() {
                guest.ended(now, ExitReason::Shutdown);
                gone.push(guest.observed());
            }
        }
        for observed in gone {
            for session in state.take_sessions_of(observed.instance) {
                session.end();
            }
            self.publish(observed);
        }
        state
    }

    /// Somebody on the network spoke from this address, which the host's kernel remembers.
    pub fn speaks(&self, mac: &str, address: std::net::IpAddr) {
        self.lock().spoke.push((mac.to_ascii_lowercase(), address));
    }

    /// Something happens in a machine, and is told.
    pub fn happens(&self, instance: InstanceId, what: Happened) {
        self.events.publish(&AgentEvent::Machine { news: MachineNews { instance, what } });
    }

    fn publish(&self, observed: karst_model::guest::Observed) {
        self.events.publish(&AgentEvent::Guest { observed: Box::new(observed) });
    }

    fn take_fault(&self, name: &str) -> Option<Fault> {
        let mut faults = self.faults.lock().unwrap();
        faults.get_mut(name).and_then(VecDeque::pop_front)
    }

    async fn travel(&self, out: bool) -> Result<()> {
        let Some(caller) = &self.options.caller else {
            return Ok(());
        };
        let (from, to) = if out { (caller, &self.options.name) } else { (&self.options.name, caller) };
        let down = |e| {
            Error::unavailable(format!("the host {} cannot be reached", self.options.name)).with_context(e)
        };
        self.env.link(from, to).await.map_err(down)
    }

    /// Everything that is common to calls: links, faults, latency, fence, deadline, crash.
    async fn act<T: Send>(
        &self,
        name: &'static str,
        mutation: bool,
        context: &CallContext,
        work: impl Future<Output = Result<T>> + Send,
    ) -> Result<T> {
        *self.counts.lock().unwrap().entry(name).or_default() += 1;
        let mut incarnation = self.incarnation.subscribe();
        incarnation.borrow_and_update();
        let mut reachable = self.reachable.subscribe();
        let gone = || Error::unavailable(format!("the agent of {} ended", self.options.name));
        let body = async {
            self.travel(true).await?;
            let fault = self.take_fault(name);
            match &fault {
                Some(Fault::FailBefore(e)) => return Err(e.clone()),
                Some(Fault::HangBefore) => std::future::pending().await,
                Some(Fault::Delay(d)) => self.env.sleep(*d).await,
                Some(Fault::CrashBefore) => {
                    self.crash();
                    return Err(gone());
                }
                _ => {}
            }
            let (least, most) = self.options.latency;
            if !most.is_zero() {
                let spread = (most.saturating_sub(least).as_micros() as u64).max(1);
                self.env.sleep(least + Duration::from_micros(self.env.random_u64() % spread)).await;
            }
            let answer = if mutation { self.guard.run(context, work).await } else { work.await }?;
            match fault {
                Some(Fault::FailAfter(e)) => return Err(e),
                Some(Fault::HangAfter) => std::future::pending().await,
                Some(Fault::CrashAfter) => {
                    self.crash();
                    return Err(gone());
                }
                _ => {}
            }
            self.travel(false).await?;
            Ok(answer)
        };
        let cut = async {
            let crash = pin!(incarnation.changed());
            let unreachable = async { drop(reachable.wait_for(|r| !r).await) };
            select(pin!(unreachable), crash).await;
        };
        let bounded = self.env.timeout(context.deadline, body);
        // The call itself first, so that one which crashes the agent after its effect answers by itself.
        let unreachable = Error::unavailable(format!("the host {} cannot be reached", self.options.name));
        if !*self.reachable.borrow() {
            return Err(unreachable);
        }
        match select(pin!(bounded), pin!(cut)).await {
            Either::Left((Ok(outcome), _)) => outcome,
            Either::Left((Err(_), _)) => {
                Err(Error::timeout(format!("{name} did not end within its time ({:?})", context.deadline)))
            }
            Either::Right(_) => Err(gone()),
        }
    }
}
