//! Projects and profiles, who is trusted and what the server is told: the use cases, a module for each.

pub mod access;
pub mod figures;
pub(crate) mod limits;
pub mod profile_update;
pub mod profiles;
pub mod projects;
pub mod records;
pub(crate) mod restricted;
pub mod rules;
pub mod scram;
pub mod server;
pub mod tokens;
pub mod trust;
pub mod warnings;

pub use profiles::UpdateProfile;

use crate::{Engine, Records, Row, context::Context};
use karst_model::{
    ProfileId, ProjectId, Result,
    access::Permission,
    project::{DEFAULT_PROJECT, Project},
};

/// What [`crate::db::Tx::touch`] takes for a profile, and its lock.
pub(crate) fn profile_uses(id: ProfileId) -> String {
    format!("profiles/{id}")
}

/// What [`crate::db::Tx::touch`] takes for a project.
pub(crate) fn project_uses(id: ProjectId) -> String {
    format!("projects/{id}")
}

impl Records {
    /// The project whose `feature` (such as `features.profiles`) a project uses: its own, or the default project's.
    pub(crate) fn home(&self, project: &Project, feature: &str) -> ProjectId {
        if rules::ProjectRules::has(&project.config, feature) {
            return project.id;
        }
        self.project(DEFAULT_PROJECT).map_or(project.id, |p| p.id)
    }
}

impl Engine {
    /// The project that has what `feature` names for the project `name`. Who sees a project sees what it shares; who
    /// changes what is shared must be allowed to where it is.
    pub(crate) fn project_of(
        &self,
        context: &Context,
        name: &str,
        feature: &str,
        permission: Permission,
    ) -> Result<Row<Project>> {
        let named = self.project(context, name, Permission::ProjectView)?;
        let home = {
            let records = self.inner().inventory.read();
            let id = records.home(&named, feature);
            records.projects.get(&id).cloned().unwrap_or(named)
        };
        if permission != Permission::ProjectView {
            context.demand(permission, &home)?;
        }
        Ok(home)
    }
}
