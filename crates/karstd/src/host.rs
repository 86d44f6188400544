//! The host process: the agent of this machine, behind a unix socket that control alone reaches.

use crate::{control, privilege};
use karst_agent::{ServerOptions, serve};
use karst_agent_host::{HostPolicy, RealAgent, RealOptions};
use karst_model::{Error, Result};
use std::path::Path;

/// Where its policy is looked for before DIR.
pub const POLICY: &str = "/etc/karst";

/// The role `host`.
///
/// # Errors
/// When it was not started as it must be, its policy is not to be trusted, or its registry is damaged.
pub fn start(dir: &Path, inherited: &privilege::Inherited) -> Result<()> {
    privilege::small_heap();
    let [socket] = privilege::enter(inherited, false)?;
    let policy = HostPolicy::load(&[Path::new(POLICY), dir])?;
    let options =
        RealOptions { dir: dir.to_owned(), daemon_id: inherited.daemon_id.clone(), policy, worker: None };
    let uids = vec![inherited.control_uid];
    control::block_on(|env, mut shutdown| {
        let listener = control::listener(socket)?;
        Ok(async move {
            let agent = RealAgent::open(env.clone(), options).await?;
            let guard = agent.guard();
            let server = ServerOptions { uids, ..ServerOptions::default() };
            let serving = serve(env, listener, agent.clone(), guard, server);
            let outcome = tokio::select! {
                biased;
                // Mutations that run are dropped with the runtime; they are idempotent, and control asks again.
                _ = shutdown.wait_for(|end| *end) => Ok(()),
                outcome = serving => outcome.map_err(|e| Error::internal("the agent's socket failed", e)),
            };
            agent.flush().await;
            outcome
        })
    })
}
