//! Links between named endpoints of a simulated network, which can be slow, cut or cut in one direction.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::task::Waker;
use std::time::Duration;

/// A message could not pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkDown {
    /// The sender.
    pub from: String,
    /// The endpoint that it did not reach.
    pub to: String,
}

impl std::fmt::Display for LinkDown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} does not reach {}", self.from, self.to)
    }
}

impl std::error::Error for LinkDown {}

/// What happens to a message on a link that is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// It fails at once, like a connection that is refused.
    Refuse,
    /// It fails after this time, like a connection that times out, unless the link heals before.
    Hang(Duration),
}

#[derive(Debug, Default)]
struct State {
    /// Keyed by (from, to); `*` stands for every endpoint.
    cuts: BTreeMap<(String, String), Cut>,
    latency: (Duration, Duration),
    /// Woken when something heals.
    waiting: Vec<Waker>,
}

/// The switchboard of a [`crate::SeededEnv`]: which links are cut, and how slow the others are.
#[derive(Debug, Default)]
pub struct Partition {
    state: Mutex<State>,
}

impl Partition {
    /// Cuts the link in both directions.
    pub fn cut(&self, a: &str, b: &str, how: Cut) {
        self.cut_one_way(a, b, how);
        self.cut_one_way(b, a, how);
    }

    /// Cuts the link for messages from `from` to `to` only: requests arrive and answers do not, or the reverse.
    pub fn cut_one_way(&self, from: &str, to: &str, how: Cut) {
        self.state.lock().unwrap().cuts.insert((from.to_owned(), to.to_owned()), how);
    }

    /// Cuts `name` off from everybody.
    pub fn isolate(&self, name: &str, how: Cut) {
        self.cut(name, "*", how);
    }

    /// Undoes [`Partition::cut`] and [`Partition::cut_one_way`] between the two.
    pub fn heal(&self, a: &str, b: &str) {
        let mut state = self.state.lock().unwrap();
        state.cuts.remove(&(a.to_owned(), b.to_owned()));
        state.cuts.remove(&(b.to_owned(), a.to_owned()));
        wake(state);
    }

    /// Undoes [`Partition::isolate`].
    pub fn rejoin(&self, name: &str) {
        self.heal(name, "*");
    }

    /// Makes every link whole.
    pub fn heal_all(&self) {
        let mut state = self.state.lock().unwrap();
        state.cuts.clear();
        wake(state);
    }

    /// Every message takes a time between these two, chosen by the seed. Zero at the start.
    pub fn set_latency(&self, least: Duration, most: Duration) {
        self.state.lock().unwrap().latency = (least, most.max(least));
    }

    pub(crate) fn latency(&self) -> (Duration, Duration) {
        self.state.lock().unwrap().latency
    }

    /// How the link from `from` to `to` is cut; a cut link's waker is kept until something heals.
    pub(crate) fn state_of(&self, from: &str, to: &str, waker: Option<&Waker>) -> Option<Cut> {
        let mut state = self.state.lock().unwrap();
        let keys = [(from, to), (from, "*"), ("*", to)];
        let found =
            keys.iter().find_map(|(from, to)| state.cuts.get(&((*from).into(), (*to).into())).copied());
        if let (Some(_), Some(waker)) = (found, waker)
            && !state.waiting.iter().any(|known| known.will_wake(waker))
        {
            state.waiting.push(waker.clone());
        }
        found
    }
}

/// Wakes outside the lock: a waker takes the executor's lock.
fn wake(mut state: std::sync::MutexGuard<'_, State>) {
    let waiting = std::mem::take(&mut state.waiting);
    drop(state);
    waiting.into_iter().for_each(Waker::wake);
}
