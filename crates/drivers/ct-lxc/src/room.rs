//! Room for many containers: the limit of the host that those with systemd meet first.

use karst_host::shared_limit::SharedLimit;
use karst_model::Result;

/// Where all daemons of the machine note what a limit was. Gone with the next boot, as what was raised is.
const NOTES: &str = "/run/karst/limits";

fn limit() -> Result<SharedLimit> {
    SharedLimit::new(NOTES, &["fs", "inotify", "max_user_instances"])
}

/// Inotify instances that a host with so many containers should allow: all are counted as root's, the kernel allows 128, and
/// a container with systemd has about eight. One that gets none does not boot.
fn watches(containers: usize) -> u64 {
    (containers as u64 * 16).next_power_of_two().max(1024)
}

/// Raises the limit so that so many containers boot. Blocks for moments.
pub(crate) fn make(containers: usize) {
    if let Err(e) = limit().and_then(|limit| limit.raise(watches(containers))) {
        tracing::info!(error = %e, "the limit of inotify instances stays; with many containers some will not boot");
    }
}

/// Gives back what was raised, for the last daemon that leaves the machine: not while `unclaimed` says that another one has
/// containers, which claims their ids before it raises the limit. Blocks for moments.
///
/// # Errors
/// Internal and unavailable; it can be called again.
pub fn give_back(unclaimed: impl FnOnce() -> bool) -> Result<()> {
    limit()?.give_back(unclaimed)
}

#[cfg(test)]
mod tests {
    #[test]
    fn there_is_room_for_every_container() {
        for containers in [1, 16, 17, 64, 65, 500, 4000] {
            assert!(super::watches(containers) >= containers as u64 * 16);
        }
        assert_eq!(super::watches(1), 1024);
    }
}
