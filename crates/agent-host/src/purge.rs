//! The end of a daemon: everything that it has on the machine outside DIR goes.

use crate::RealAgent;
use karst_agent::names::is_guest_interface;
use karst_guest::{StopMode, keeper};
use karst_model::{Error, InstanceId, Result, spec::PoolSource};

/// What would not go, in the order of trying.
#[derive(Debug, Default)]
struct Left(Vec<Error>);

impl Left {
    fn note<T>(&mut self, what: impl Into<String>, outcome: Result<T>) -> Option<T> {
        let failed = |e: Error| {
            let what = what.into();
            tracing::error!(what, error = %e, context = e.context, "something could not be removed; going on with the rest");
            self.0.push(Error { message: format!("{what}: {e}"), field: None, ..e });
        };
        outcome.map_err(failed).ok()
    }

    /// All of it, as one error.
    fn told(self) -> Result<()> {
        Error::together(self.0).map_err(|e| Error {
            message: format!("not everything could be removed; purge again when it can be: {}", e.message),
            ..e
        })
    }
}

impl RealAgent {
    /// Removes every trace of this daemon outside DIR: guests are ended, with their keepers where these do not answer; networks
    /// and claims are given back. Volumes and images stay; they go with DIR.
    ///
    /// # Errors
    /// All that could not be removed, after everything was tried.
    pub async fn purge(&self) -> Result<()> {
        let mut left = Left::default();
        for (id, _) in self.all_guests() {
            let ended = self.end(id).await;
            left.note(format!("instance {id}"), ended);
        }
        for (id, _) in self.registry.memory_places() {
            left.note(format!("memory of instance {id}"), self.forget_memory(id).await);
        }
        self.end_keepers(&mut left).await;
        // What no record tells of any more is found by the daemon's id: processes first, then what they held.
        let group = format!("karst-{}", self.options.daemon_id);
        let cgroups = left.note("control groups", karst_host::cgroup::Cgroups::detect());
        if let Some(cgroups) = &cgroups {
            left.note("processes", cgroups.kill(&group).await);
        }
        left.note("interfaces", self.remove_interfaces());
        left.note("locks of liblxc", karst_ct_lxc::locks::leave(&self.registry.path("guests")));
        for pool in left.note("the list of pools", self.registry.pools()).unwrap_or_default() {
            self.forget_pool(pool.id);
            // What lies in DIR goes with it; what lies elsewhere goes now.
            let place = self.pool_place(pool.id);
            left.note(format!("limits of pool {}", pool.id), place.release_limits(&pool).await);
            let closed = match pool.source {
                PoolSource::Own { .. } => place.close(&pool).await,
                PoolSource::Granted { .. } => place.remove(&pool).await,
            };
            left.note(format!("pool {}", pool.id), closed);
        }
        left.note("networks", self.networks.purge().await);
        if let Some(cgroups) = &cgroups {
            left.note("control groups", cgroups.remove(&group).await);
        }
        left.note("AppArmor profiles", karst_ct_lxc::apparmor::unload(&self.options.daemon_id).await);
        for claim in left.note("claims of user ids", self.ids.claims()).unwrap_or_default() {
            self.ids.release(claim.range, &claim.owner);
        }
        let ids = self.ids.clone();
        let give_back = move || karst_ct_lxc::room::give_back(|| ids.unclaimed());
        let given = tokio::task::spawn_blocking(give_back).await;
        let given = given.map_err(|e| Error::internal("it was broken off", e)).and_then(|given| given);
        left.note("limits of the kernel", given);
        self.ids.leave();
        left.told()
    }

    async fn end(&self, id: InstanceId) -> Result<()> {
        let (_, driver) = self.known(id)?;
        driver.stop(id, StopMode::Force).await?;
        driver.destroy(id).await?;
        self.forget(id).await
    }

    /// Ends keepers that still live, and their guests with them: of guests that no record tells of, that no driver of this
    /// host knows, or that would not end otherwise.
    async fn end_keepers(&self, left: &mut Left) {
        let found = left.note("the list of keepers", keeper::find_all(&self.registry.path("guests")));
        for found in found.unwrap_or_default().into_iter().filter(|f| f.alive) {
            let ended = match keeper::end_keeper(&found.dir) {
                Ok(()) => keeper::wait_gone(&found.dir).await,
                failed => failed,
            };
            left.note(format!("the keeper in {}", found.dir.display()), ended);
        }
    }

    fn remove_interfaces(&self) -> Result<()> {
        let mut outcome = Ok(());
        for link in std::fs::read_dir("/sys/class/net")?.flatten() {
            let name = link.file_name().to_string_lossy().into_owned();
            if is_guest_interface(&self.options.daemon_id, &name) {
                // It may go by itself at this moment, with its namespace.
                let gone = karst_host::link::delete(&name)
                    .or_else(|e| if link.path().exists() { Err(e) } else { Ok(()) });
                outcome = outcome.and(gone);
            }
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::ErrorKind;

    #[test]
    fn all_that_is_left_is_told() {
        let mut left = Left::default();
        assert_eq!(left.note("one", Ok(7)), Some(7));
        left.note::<()>("two", Err(Error::conflict("in use").with_context("argv")));
        left.note::<()>("three", Err(Error::timeout("slow")));
        let told = left.told().unwrap_err();
        assert!(told.is(ErrorKind::Conflict) && told.message.ends_with("two: in use; three: slow"), "{told}");
        Left::default().told().unwrap();
    }
}
