//! The seeded environment: a virtual clock, one thread, and every choice made by one generator.

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::future::Future;
use std::hash::{DefaultHasher, Hasher};
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::partition::{Cut, LinkDown, Partition};
use crate::task::{self, TaskHandle};
use crate::{Env, SharedEnv};

/// 2026-01-01T00:00:00Z: where every seeded wall clock starts.
const EPOCH_SECONDS: i64 = 1_767_225_600;
/// Lines of the trace that are kept; the digest covers all of them.
const TRACE_LINES: usize = 4096;
/// Polls after which a run is taken for an endless loop.
const POLL_LIMIT: u64 = 20_000_000;

type TaskId = u64;

struct Task {
    name: Arc<str>,
    node: Option<Arc<str>>,
    /// Taken out while it is being polled.
    future: Option<BoxFuture<'static, ()>>,
    waker: Waker,
    queued: bool,
}

struct State {
    now: Duration,
    next_id: u64,
    tasks: BTreeMap<TaskId, Task>,
    ready: Vec<TaskId>,
    timers: BTreeMap<(Duration, u64), Waker>,
    /// Three streams of one seed, so that drawing a UUID more does not change the schedule.
    schedule: ChaCha8Rng,
    random: ChaCha8Rng,
    network: ChaCha8Rng,
    trace: VecDeque<String>,
    digest: DefaultHasher,
    polls: u64,
    panics: Vec<String>,
    panics_allowed: bool,
}

struct Shared {
    state: Mutex<State>,
    partition: Partition,
}

/// A reproducible world. Cheap to clone; clones share the world.
///
/// ```
/// use std::time::Duration;
/// use karst_env::{Env, EnvExt, SeededEnv};
///
/// let hours = SeededEnv::run(7, |env| async move {
///     env.sleep(Duration::from_secs(3600 * 5)).await; // takes no real time
///     env.monotonic().as_secs() / 3600
/// });
/// assert_eq!(hours, 5);
/// ```
#[derive(Clone)]
pub struct SeededEnv {
    shared: Arc<Shared>,
    node: Option<Arc<str>>,
}

impl std::fmt::Debug for SeededEnv {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SeededEnv").field("node", &self.node).finish_non_exhaustive()
    }
}

struct TaskWaker {
    id: TaskId,
    shared: Weak<Shared>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        let mut state = shared.lock();
        let Some(task) = state.tasks.get_mut(&self.id) else {
            return;
        };
        if !task.queued {
            task.queued = true;
            state.ready.push(self.id);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl State {
    fn note(&mut self, line: String) {
        self.digest.write(line.as_bytes());
        self.digest.write_u8(b'\n');
        if self.trace.len() == TRACE_LINES {
            self.trace.pop_front();
        }
        self.trace.push_back(line);
    }
}

impl SeededEnv {
    /// A world that follows from `seed` alone.
    pub fn new(seed: u64) -> SeededEnv {
        let stream = |number| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(number);
            rng
        };
        let state = State {
            now: Duration::ZERO,
            next_id: 0,
            tasks: BTreeMap::new(),
            ready: Vec::new(),
            timers: BTreeMap::new(),
            schedule: stream(0),
            random: stream(1),
            network: stream(2),
            trace: VecDeque::new(),
            digest: DefaultHasher::new(),
            polls: 0,
            panics: Vec::new(),
            panics_allowed: false,
        };
        let shared = Shared { state: Mutex::new(state), partition: Partition::default() };
        SeededEnv { shared: Arc::new(shared), node: None }
    }

    /// Makes a world, runs what `body` returns in it until that is done, and ends all other tasks.
    pub fn run<F, Fut>(seed: u64, body: F) -> Fut::Output
    where
        F: FnOnce(SeededEnv) -> Fut,
        Fut: Future + Send + 'static,
        Fut::Output: Send + 'static,
    {
        let env = SeededEnv::new(seed);
        env.block_on(body(env.clone()))
    }

    /// Runs `future` as the main task until it is done, then drops all other tasks.
    ///
    /// # Panics
    /// When the main task or (unless [`SeededEnv::allow_panics`]) any other task panicked, when nothing can run and
    /// no timer is pending (a deadlock; the waiting tasks are named), or after 20 million polls.
    pub fn block_on<Fut>(&self, future: Fut) -> Fut::Output
    where
        Fut: Future + Send + 'static,
        Fut::Output: Send + 'static,
    {
        let result = Arc::new(Mutex::new(None));
        let slot = result.clone();
        let main = async move {
            let outcome = AssertUnwindSafe(future).catch_unwind().await;
            *slot.lock().unwrap() = Some(outcome);
        };
        self.add_task("main", None, main.boxed());
        let outcome = loop {
            if let Some(outcome) = result.lock().unwrap().take() {
                break outcome;
            }
            self.step();
        };
        let (tasks, panics) = {
            let mut state = self.shared.lock();
            state.ready.clear();
            let panics = if state.panics_allowed { Vec::new() } else { std::mem::take(&mut state.panics) };
            (std::mem::take(&mut state.tasks), panics)
        };
        drop(tasks); // outside the lock: what they own may wake others
        match outcome {
            Err(payload) => resume_unwind(payload),
            Ok(_) if !panics.is_empty() => panic!("tasks panicked: {}", panics.join("; ")),
            Ok(output) => output,
        }
    }

    /// Polls one task, or moves the clock to the next timer.
    fn step(&self) {
        let mut state = self.shared.lock();
        if state.ready.is_empty() {
            let Some(((at, _), waker)) = state.timers.pop_first() else {
                let names: Vec<_> = state.tasks.values().map(|task| task.name.to_string()).collect();
                drop(state);
                panic!("deadlock: nothing can run and no timer is pending; waiting: {}", names.join(", "));
            };
            state.now = state.now.max(at);
            drop(state);
            waker.wake();
            return;
        }
        // By number, not in the order of their wake-ups: tokio's `watch` wakes in an order of its own.
        state.ready.sort_unstable();
        let count = state.ready.len();
        let pick = state.schedule.random_range(0..count);
        let id = state.ready.swap_remove(pick);
        state.polls += 1;
        assert!(state.polls < POLL_LIMIT, "no end after {POLL_LIMIT} polls");
        let Some(task) = state.tasks.get_mut(&id) else {
            return;
        };
        task.queued = false;
        let (Some(mut future), waker, name) = (task.future.take(), task.waker.clone(), task.name.clone())
        else {
            return;
        };
        let line = format!("{} poll {name}", state.now.as_micros());
        state.note(line);
        drop(state);
        let done = future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
        let mut state = self.shared.lock();
        if done {
            state.tasks.remove(&id);
        } else if let Some(task) = state.tasks.get_mut(&id) {
            task.future = Some(future);
            return;
        }
        // Done, or killed by its own node while it ran.
        drop(state);
        drop(future);
    }

    fn add_task(&self, name: &str, node: Option<Arc<str>>, future: BoxFuture<'static, ()>) {
        let mut state = self.shared.lock();
        let id = state.next_id;
        state.next_id += 1;
        let waker = Waker::from(Arc::new(TaskWaker { id, shared: Arc::downgrade(&self.shared) }));
        let name = match &node {
            Some(node) => format!("{node}/{name}#{id}"),
            None => format!("{name}#{id}"),
        };
        let task = Task { name: name.into(), node, future: Some(future), waker, queued: true };
        state.tasks.insert(id, task);
        state.ready.push(id);
    }

    /// The same world as seen by the node `name`: tasks spawned through it belong to the node and die with it.
    pub fn node(&self, name: &str) -> SeededEnv {
        SeededEnv { shared: self.shared.clone(), node: Some(name.into()) }
    }

    /// Ends all tasks of a node at once, where they wait, as kill -9 would. Returns how many there were.
    pub fn crash_node(&self, name: &str) -> usize {
        let mut state = self.shared.lock();
        let line = format!("{} crash {name}", state.now.as_micros());
        state.note(line);
        let of_node = |task: &Task| task.node.as_deref() == Some(name);
        let ids: Vec<TaskId> =
            state.tasks.iter().filter(|(_, task)| of_node(task)).map(|(id, _)| *id).collect();
        let gone: Vec<Task> = ids.iter().filter_map(|id| state.tasks.remove(id)).collect();
        state.ready.retain(|id| !ids.contains(id));
        drop(state);
        gone.len()
    }

    /// The switchboard of the links.
    pub fn partition(&self) -> &Partition {
        &self.shared.partition
    }

    /// Adds a line to the trace.
    pub fn trace(&self, text: &str) {
        let mut state = self.shared.lock();
        let line = format!("{} {text}", state.now.as_micros());
        state.note(line);
    }

    /// The last lines of the trace (at most 4096): virtual microseconds, then what happened.
    pub fn trace_lines(&self) -> Vec<String> {
        self.shared.lock().trace.iter().cloned().collect()
    }

    /// A digest of the whole trace: equal for two runs exactly when they went the same way.
    pub fn trace_digest(&self) -> u64 {
        self.shared.lock().digest.finish()
    }

    /// Lets [`SeededEnv::block_on`] succeed although tasks panicked.
    pub fn allow_panics(&self) {
        self.shared.lock().panics_allowed = true;
    }

    /// A number below `bound` out of the random stream, for tests that choose.
    pub fn below(&self, bound: u64) -> u64 {
        self.shared.lock().random.random_range(0..bound)
    }

    /// This environment as the trait object that parts take.
    pub fn shared(&self) -> SharedEnv {
        Arc::new(self.clone())
    }
}

impl Env for SeededEnv {
    fn now(&self) -> jiff::Timestamp {
        let start = jiff::Timestamp::from_second(EPOCH_SECONDS).expect("a valid date");
        start + self.monotonic()
    }

    fn monotonic(&self) -> Duration {
        self.shared.lock().now
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        let mut state = self.shared.lock();
        let deadline = state.now.saturating_add(duration);
        let number = state.next_id;
        state.next_id += 1;
        Sleep { shared: self.shared.clone(), key: (deadline, number) }.boxed()
    }

    fn fill_random(&self, buffer: &mut [u8]) {
        self.shared.lock().random.fill_bytes(buffer);
    }

    fn spawn(&self, name: &str, future: BoxFuture<'static, ()>) -> TaskHandle {
        let shared = Arc::downgrade(&self.shared);
        let task_name = name.to_owned();
        let (handle, wrapped) = task::wrap(name, future, move |text| {
            if let Some(shared) = shared.upgrade() {
                let mut state = shared.lock();
                let line = format!("{} panic {task_name}: {text}", state.now.as_micros());
                state.note(line);
                state.panics.push(format!("{task_name}: {text}"));
            }
        });
        self.add_task(name, self.node.clone(), wrapped);
        handle
    }

    fn link(&self, from: &str, to: &str) -> BoxFuture<'static, Result<(), LinkDown>> {
        let env = self.clone();
        let (from, to) = (from.to_owned(), to.to_owned());
        async move {
            let (least, most) = env.shared.partition.latency();
            if !most.is_zero() {
                let extra = (most - least).as_micros() as u64;
                let extra = env.shared.lock().network.random_range(0..=extra);
                env.sleep(least + Duration::from_micros(extra)).await;
            }
            let passed = match env.shared.partition.state_of(&from, &to, None) {
                None => true,
                Some(Cut::Refuse) => false,
                Some(Cut::Hang(longest)) => {
                    let healed = futures::future::poll_fn(|cx| {
                        match env.shared.partition.state_of(&from, &to, Some(cx.waker())) {
                            None => Poll::Ready(()),
                            Some(_) => Poll::Pending,
                        }
                    });
                    crate::EnvExt::timeout(&env, longest, healed).await.is_ok()
                }
            };
            if passed { Ok(()) } else { Err(LinkDown { from, to }) }
        }
        .boxed()
    }
}

/// A timer of the virtual clock.
struct Sleep {
    shared: Arc<Shared>,
    key: (Duration, u64),
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.shared.lock();
        if state.now >= self.key.0 {
            return Poll::Ready(());
        }
        state.timers.insert(self.key, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        let removed = self.shared.lock().timers.remove(&self.key);
        drop(removed);
    }
}
