//! Figures for monitoring, as far as the caller may see them.

use crate::{Engine, InstanceView, compute::metrics::Sample, context::Context};
use karst_model::{Result, access::Permission, guest::Metrics, warning::WarningStatus};
use std::{sync::Arc, time::Duration};

/// What monitoring gets.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    /// Running instances, by project and name; `sample` has figures of each.
    pub instances: Vec<Arc<InstanceView>>,
    /// Figures of these, and of others that the caller may not see.
    sample: Sample,
    /// The server's own; for those who may see all.
    pub server: Option<ServerFigures>,
}

/// Figures of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ServerFigures {
    /// Operations that run.
    pub operations: usize,
    /// Warnings that nobody acknowledged.
    pub warnings: usize,
    /// Time since the engine was opened.
    pub uptime: Duration,
}

impl Figures {
    /// The instances with their figures.
    pub fn of_instances(&self) -> impl Iterator<Item = (&Arc<InstanceView>, &Metrics)> {
        self.instances.iter().filter_map(|v| Some((v, self.sample.get(&v.instance.id)?)))
    }
}

impl Engine {
    /// Figures of all running instances that the caller may see, at most 2 s old; of one project when it is named.
    ///
    /// # Errors
    /// Unauthenticated, unless metrics are open to everybody; forbidden for who may see none; not found.
    pub async fn metrics(&self, context: &Context, project: Option<&str>) -> Result<Figures> {
        let principal = context.principal();
        let everything = self.server_settings().open_metrics || principal.may(Permission::MetricsView, None);
        if !everything {
            context.demand_known()?;
        }
        let inner = self.inner();
        let sees = |p| everything || principal.may(Permission::MetricsView, Some(p));
        let only = {
            let records = inner.inventory.read();
            if !everything && !records.projects.keys().any(|p| sees(*p)) {
                context.demand_server(Permission::MetricsView)?;
            }
            match project {
                None => None,
                Some(name) => {
                    Some(records.project(name).ok().filter(|p| sees(p.id)).map(|p| p.id).ok_or_else(
                        || karst_model::Error::not_found(format!("project {name:?} not found")),
                    )?)
                }
            }
        };
        let sample = self.all_details().await;
        // Of those alone that there are figures of: where most are stopped, to look at all is dearer than the figures.
        let mut instances: Vec<Arc<InstanceView>> = {
            let records = inner.inventory.read();
            let running = sample.keys().filter_map(|id| records.instances.get(id));
            running
                .filter(|i| sees(i.project) && only.is_none_or(|o| o == i.project))
                .filter_map(|i| inner.inventory.view(&records, i.id))
                .collect()
        };
        instances.sort_by(|a, b| {
            (&*a.project.name, &*a.instance.name).cmp(&(&*b.project.name, &*b.instance.name))
        });
        let server = (everything && project.is_none()).then(|| {
            let records = inner.inventory.read();
            let warnings = records.tenancy.warnings.values();
            ServerFigures {
                operations: inner.operations.running().len(),
                warnings: warnings.filter(|w| w.status == WarningStatus::New).count(),
                uptime: inner.env.monotonic().saturating_sub(inner.opened),
            }
        });
        Ok(Figures { instances, sample, server })
    }
}
