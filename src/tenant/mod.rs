//! Tenants share the server: one tenant per API key, with its limits, its token bucket and its account. These are pure state
//! machines: time is passed in.

mod accounts;
mod bucket;
mod limits;

pub use accounts::{Accounts, Closed, Quota, TenantUsage};
pub use bucket::TokenBucket;
pub use limits::{Tenant, TenantLimits};
