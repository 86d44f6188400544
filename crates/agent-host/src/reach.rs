//! Whether a file system answers. One on a server that has gone (NFS mounted hard, as it is by default) lets whoever asks wait until
//! the server is back, and a thread that waits so cannot be ended. So one thread for each place asks, however many want to know, and
//! who wants to know waits for a bounded time.

use karst_model::{Error, Result};
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{LazyLock, Mutex, MutexGuard},
    time::Duration,
};
use tokio::sync::watch;

/// A busy server takes its time; one that is gone takes for ever.
const PATIENCE: Duration = Duration::from_secs(10);

/// Places that are being asked, with what tells of the end.
static ASKED: LazyLock<Mutex<HashMap<PathBuf, watch::Receiver<bool>>>> = LazyLock::new(Mutex::default);

fn asked() -> MutexGuard<'static, HashMap<PathBuf, watch::Receiver<bool>>> {
    ASKED.lock().unwrap_or_else(|e| e.into_inner())
}

/// Asks the file system of `place` for something that no cache answers.
///
/// # Errors
/// Unavailable when it does not answer in time.
pub(crate) async fn answers(place: &Path) -> Result<()> {
    ask(place, PATIENCE, |place| {
        // What is wrong with the place is told by whoever uses it.
        let _ = rustix::fs::statvfs(place);
    })
    .await
}

async fn ask(place: &Path, patience: Duration, question: fn(&Path)) -> Result<()> {
    let mut told = {
        let mut all = asked();
        match all.get(place) {
            Some(told) => told.clone(),
            None => {
                let (tell, told) = watch::channel(false);
                let of = place.to_owned();
                let thread = std::thread::Builder::new().name("reach".into()).spawn(move || {
                    question(&of);
                    asked().remove(&of);
                    tell.send_replace(true);
                });
                thread?;
                all.insert(place.to_owned(), told.clone());
                told
            }
        }
    };
    match tokio::time::timeout(patience, told.wait_for(|done| *done)).await {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::unavailable(
            "the file system of the pool does not answer; is the server there that it is mounted from?",
        )
        .with_context(place.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    #[tokio::test]
    async fn what_does_not_answer_is_asked_once_and_others_are_not_kept() {
        static QUESTIONS: AtomicU32 = AtomicU32::new(0);
        static GONE: AtomicBool = AtomicBool::new(true);
        let place = Path::new("/nonexistent/karst-reach");
        let hangs: fn(&Path) = |_| {
            QUESTIONS.fetch_add(1, Ordering::SeqCst);
            while GONE.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(2));
            }
        };
        for _ in 0..3 {
            let e = ask(place, Duration::from_millis(20), hangs).await.unwrap_err();
            assert!(
                e.is(karst_model::ErrorKind::Unavailable) && e.message.contains("does not answer"),
                "{e:?}"
            );
        }
        assert_eq!(QUESTIONS.load(Ordering::SeqCst), 1);
        answers(&std::env::temp_dir()).await.unwrap();
        answers(Path::new("/nonexistent/other")).await.expect("that it is not there is an answer");
        GONE.store(false, Ordering::SeqCst);
        while asked().contains_key(place) {
            tokio::task::yield_now().await;
        }
        ask(place, PATIENCE, hangs).await.unwrap();
        assert_eq!(QUESTIONS.load(Ordering::SeqCst), 2, "asked anew");
    }
}
