//! A lock of what tasks share, that a panic does not take away from the others.
//!
//! A panic ends the task in which it happens. With `std`'s lock it would then end every other task that comes to the same lock,
//! and with a lock that each call takes, that is every call until the process is started again. Here they go on with what is
//! there. So what is done under such a lock leaves it whole at every step: it inserts, removes, replaces or counts.

use std::sync::{MutexGuard, PoisonError};

/// See the module. Never held across an `await`.
#[derive(Debug, Default)]
pub struct Mutex<T>(std::sync::Mutex<T>);

impl<T> Mutex<T> {
    /// Nobody has it yet.
    pub const fn new(value: T) -> Self {
        Self(std::sync::Mutex::new(value))
    }

    /// Waits until nobody else has it.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::BTreeMap, sync::Arc};

    #[test]
    fn others_go_on_after_a_panic_under_it() {
        let records = Arc::new(Mutex::new(BTreeMap::from([(1, "one")])));
        let theirs = records.clone();
        let panicked = std::thread::spawn(move || {
            let mut records = theirs.lock();
            records.insert(2, "two");
            panic!("on purpose: it has the lock");
        });
        panicked.join().unwrap_err();
        assert!(records.0.is_poisoned(), "with std's lock the next would panic too");
        records.lock().insert(3, "three");
        assert_eq!(records.lock().values().copied().collect::<Vec<_>>(), ["one", "two", "three"]);
    }
}
