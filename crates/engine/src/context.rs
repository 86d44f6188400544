//! Who asks: use cases demand a [`Context`], and none can be built without a principal.

use karst_model::{
    Error, Result,
    access::{Permission, Principal},
    project::Project,
};
use std::sync::Arc;

/// The principal of a request. Front ends build it from what the transport authenticated; use cases decide by it.
#[derive(Debug, Clone)]
pub struct Context {
    principal: Arc<Principal>,
}

impl Context {
    /// A context of `principal`.
    pub fn new(principal: Principal) -> Self {
        Self { principal: Arc::new(principal) }
    }

    /// The platform's own, for reconcilers and bootstrap.
    pub(crate) fn system() -> Self {
        Self::new(Principal::system())
    }

    /// The principal.
    pub fn principal(&self) -> &Principal {
        &self.principal
    }

    /// Demands that the principal is somebody: nobody else learns whether a thing exists.
    ///
    /// # Errors
    /// Unauthenticated.
    pub fn demand_known(&self) -> Result<()> {
        match self.principal.is_known() {
            false => Err(Error::unauthenticated("authentication is required")),
            true => Ok(()),
        }
    }

    /// Demands a permission over the server.
    ///
    /// # Errors
    /// Unauthenticated for nobody, forbidden otherwise.
    pub fn demand_server(&self, permission: Permission) -> Result<()> {
        if self.principal.may(permission, None) { Ok(()) } else { Err(self.refusal(permission)) }
    }

    /// Demands a permission in a project. Who may not even see the project learns nothing of it: not found.
    ///
    /// # Errors
    /// Unauthenticated, not found, or forbidden.
    pub fn demand(&self, permission: Permission, project: &Project) -> Result<()> {
        if self.principal.may(permission, Some(project.id)) {
            return Ok(());
        }
        if self.principal.is_known() && !self.principal.may(Permission::ProjectView, Some(project.id)) {
            return Err(Error::not_found(format!("project {:?} not found", &*project.name)));
        }
        Err(self.refusal(permission))
    }

    fn refusal(&self, permission: Permission) -> Error {
        if let Err(e) = self.demand_known() {
            return e;
        }
        let name = permission.as_str();
        Error::forbidden(format!("the permission {name:?} is needed for this"))
            .with_context(self.principal.identity.describe())
    }
}
