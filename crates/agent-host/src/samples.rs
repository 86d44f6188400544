//! Answers of many guests within a bounded time: the figures of all are asked for at once, and a guest that lets itself be
//! waited for, or that is hostile, costs the others neither their answer nor much time.

use futures::stream::{FuturesUnordered, StreamExt};
use karst_env::{EnvExt, SharedEnv};
use std::{future::Future, pin::Pin, task::Poll, time::Duration};

/// How long all of it takes at most: less than the one who asks waits, who would have nothing at all then.
const LIMIT: Duration = Duration::from_secs(2);
/// Asked at a time.
const AT_A_TIME: usize = 32;
/// Who has not answered after this is waited for on the side: the next one is asked.
const SLICE: Duration = Duration::from_millis(100);

enum Looked<T, F> {
    Told(Option<T>),
    Slow(Pin<Box<F>>),
}

/// What `ask` answers of each of `all`, as far as it has come when the time is over; in the order in which it came.
pub(crate) async fn within<I, T, F>(env: &SharedEnv, all: Vec<I>, ask: impl Fn(I) -> F) -> Vec<T>
where
    T: Send,
    F: Future<Output = Option<T>> + Send,
{
    let look = |asked: F| async move {
        let mut asked = Box::pin(asked);
        // Most answer without waiting for anything: those need no clock.
        if let Poll::Ready(told) = futures::poll!(&mut asked) {
            return Looked::Told(told);
        }
        let told = env.timeout(SLICE, &mut asked).await;
        match told {
            Ok(told) => Looked::Told(told),
            Err(_) => Looked::Slow(asked),
        }
    };
    let mut left = all.into_iter();
    let mut over = env.sleep(LIMIT);
    let (mut asked, mut slow) = (FuturesUnordered::new(), FuturesUnordered::new());
    let mut found = vec![];
    loop {
        while asked.len() < AT_A_TIME
            && let Some(next) = left.next()
        {
            asked.push(look(ask(next)));
        }
        tokio::select! {
            biased;
            Some(looked) = asked.next(), if !asked.is_empty() => match looked {
                Looked::Told(told) => found.extend(told),
                Looked::Slow(waits) => slow.push(waits),
            },
            Some(told) = slow.next(), if !slow.is_empty() => found.extend(told),
            () = &mut over, if !asked.is_empty() || !slow.is_empty() => {
                let unheard = asked.len() + slow.len() + left.len();
                tracing::debug!(unheard, "some guests did not tell their figures in time");
                return found;
            }
            else => return found,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_env::SeededEnv;
    use std::{future::pending, sync::Arc};

    /// So many guests that never answer, or only after `wait`, come first; so many that answer at once have no harm of it.
    fn told(silent: usize, wait: Option<Duration>) -> (usize, usize, Duration) {
        SeededEnv::run(1, move |env| async move {
            let env: SharedEnv = Arc::new(env);
            let began = env.monotonic();
            let ask = |n: usize| {
                let sleep = env.sleep(wait.unwrap_or_default());
                async move {
                    if n < silent {
                        sleep.await;
                        if wait.is_none() {
                            pending::<()>().await;
                        }
                    }
                    Some(n)
                }
            };
            let told = within(&env, (0..silent + 500).collect(), ask).await;
            let quick = told.iter().filter(|n| **n >= silent).count();
            (quick, told.len() - quick, env.monotonic() - began)
        })
    }

    #[test]
    fn guests_that_are_silent_take_nobodys_figures() {
        let (quick, late, took) = told(0, None);
        assert_eq!((quick, late), (500, 0));
        assert!(took < SLICE, "{took:?}");
        // The figures of each wait a second for its agent.
        let (quick, late, took) = told(64, Some(Duration::from_secs(1)));
        assert_eq!((quick, late), (500, 64));
        assert!(took < LIMIT, "{took:?}");
        let (quick, late, took) = told(300, None);
        assert_eq!((quick, late), (500, 0));
        assert!(took >= LIMIT && took < LIMIT + SLICE, "{took:?}");
    }
}
