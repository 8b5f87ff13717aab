// Package upgrade tests what happens to traffic and to what is pinned while
// Sluice is replaced, killed half-way, or enrols and un-enrols without end. Its
// tests need programs with failpoints: make upgrade builds and runs them.
package upgrade
